"""Scores of continuations against the model's own logits, position by position."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.evaluation.continuations import Request, in_batches, scores
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT

ROWS = 64


def mpt(**changes: Any) -> MPT:
    block = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16, "vocab_size": ROWS}
    torch.manual_seed(0)
    return MPT(MPTConfig.model_validate({**block, "init_config": {"name": "baseline_", "init_std": 0.3}, **changes}))


def gpt2() -> HFCausalLM:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.3)
    return HFCausalLM(GPT2LMHeadModel(config))


MODELS = {"alibi": mpt(attn_config={"alibi": True}), "learned": mpt(), "gpt2": gpt2()}
for model in MODELS.values():
    model.eval()


@torch.no_grad()
def one_by_one(model: Any, request: Request, max_length: int) -> tuple[float, bool]:
    """As the harness's documentation says it: the model is given all but the last of the last tokens."""
    tokens = torch.tensor([[*request.context, *request.continuation][-(max_length + 1) :]])
    logits: Tensor = model(tokens[:, :-1]).logits[0, -len(request.continuation) :]
    targets = torch.tensor(request.continuation)
    logarithms = logits.log_softmax(-1)[range(len(targets)), targets]
    return float(logarithms.sum()), bool((logits.argmax(-1) == targets).all())


@torch.no_grad()
def likely(model: Any, context: Sequence[int], n: int) -> list[int]:
    tokens = list(context)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


tokens = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=14)
requests = st.lists(st.builds(Request, tokens, st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5)), max_size=6)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(MODELS)), requests, st.integers(5, 16), st.sampled_from([1, 40, 1000]))
def test_scores_are_those_of_each_request_alone(name: str, asked: list[Request], length: int, budget: int) -> None:
    model = MODELS[name]
    # Twice the same, letters after the same context, and what the model itself would say.
    asked = asked + asked[:1] + [Request(asked[0].context, [i]) for i in range(3)] if asked else []
    asked += [Request(request.context, likely(model, request.context, 2)) for request in asked[:2]]
    found = scores(model, asked, max_length=length, batch_tokens=budget)
    expected = [one_by_one(model, request, length) for request in asked]
    torch.testing.assert_close([s.loglikelihood for s in found], [e[0] for e in expected], rtol=1e-5, atol=1e-5)
    assert [s.greedy for s in found] == [e[1] for e in expected]


def test_letters_after_one_context_take_one_forward() -> None:
    class Counting(MPT):
        tokens = 0

        def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            Counting.tokens += input_ids.numel()
            return super().forward(input_ids, *args, **kwargs)

    model = Counting(MODELS["alibi"].config).eval()
    scores(model, [Request([1, 2, 3], [letter]) for letter in range(20)], max_length=16, batch_tokens=1000)
    assert Counting.tokens == 3


def test_batches_are_of_like_length_and_bounded() -> None:
    assert in_batches([3, 9, 1, 4, 2, 30], 12) == [[5], [1], [3, 0, 4], [2]]


def test_a_continuation_without_a_token_is_refused() -> None:
    with pytest.raises(UserError, match="no token of its own"):
        scores(MODELS["alibi"], [Request([1], [])], max_length=16, batch_tokens=100)
    with pytest.raises(UserError, match="has 5 tokens, more than"):
        scores(MODELS["alibi"], [Request([1], [1, 2, 3, 4, 5])], max_length=4, batch_tokens=100)
