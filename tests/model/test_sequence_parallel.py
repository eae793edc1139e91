"""Two ranks that share each sequence compute what one rank does: losses, gradients and counts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT, MPTOutput
from llmtrain.model.sequence_parallel import SequenceParallel
from llmtrain.testing.ranks import run_ranks

T = 13
"""Odd: the last slice is padded."""

LEFT_PADDED = torch.arange(T) >= torch.tensor([[3], [0]])
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2, [0] * 2 + [1] + [2] * 10])

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ALiBi, documents": ({"attn_config": {"alibi": True, "attn_uses_sequence_id": True}}, {"sequence_id": DOCUMENTS}),
    "in blocks": (
        {"attn_config": {"alibi": True, "alibi_bias_max": 16, "attn_uses_sequence_id": True, "attn_impl": "blockwise"}},
        {"sequence_id": DOCUMENTS},
    ),
    "ALiBi, left padding": ({"attn_config": {"alibi": True, "qk_ln": True}}, {"attention_mask": LEFT_PADDED}),
    "four key heads with two queries each": (
        {"attn_config": {"alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 4}, "n_heads": 8},
        {},
    ),
    "learned positions": ({"tie_word_embeddings": False, "max_seq_len": T}, {}),
    "rotary, one key head": (
        {
            "attn_config": {
                "attn_type": "multiquery_attention",
                "rope": True,
                "rope_impl": "hf",
                "rope_hf_config": {"type": "dynamic", "factor": 2.0},
            },
            "max_seq_len": 8,
        },
        {},
    ),
    "three key heads, a window": (
        {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3, "rope": True,
                         "sliding_window_size": 4}},
        {},
    ),
}  # fmt: skip


def model_of(name: str) -> MPT:
    torch.manual_seed(0)
    return MPT(MPTConfig(**{"d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 64, **CASES[name][0]})).double()


def batch_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return {"input_ids": ids, "labels": labels, **CASES[name][1]}


def step(model: MPT, batch: dict[str, Tensor]) -> tuple[MPTOutput, dict[str, Tensor]]:
    model.zero_grad()
    out: MPTOutput = model(**batch, token_losses=True)
    assert out.loss is not None
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differences() -> dict[str, dict[str, float]]:
    """On two ranks: how far each case is from one rank, at most."""
    found: dict[str, dict[str, float]] = {}
    for name in CASES:
        model, batch = model_of(name), batch_of(name)
        alone, expected = step(model, batch)
        model.ranks = SequenceParallel.of_this_rank(2, "cpu")
        out, gradients = step(model, batch)
        for gradient in gradients.values():
            dist.all_reduce(gradient)  # as FSDP2 and DDP do: the mean over ranks
        assert out.loss is not None
        assert alone.loss is not None
        assert out.loss_sum is not None
        assert out.n_targets is not None
        sums = torch.stack([out.loss.detach() / 2, out.loss_sum.detach(), out.n_targets.double()])
        dist.all_reduce(sums)
        with torch.no_grad():
            model.eval()
            counted = model(**batch).n_correct
            dist.all_reduce(counted)
            ids = batch["input_ids"]
            logits = model(ids).logits
            model.ranks = None
            whole = model(ids).logits
            correct = model(**batch).n_correct
        assert out.token_losses is not None
        assert alone.token_losses is not None
        found[name] = {
            "loss": float((sums[0] - alone.loss).abs()),
            "sum": float((sums[1] - alone.loss_sum).abs()),
            "targets": float((sums[2] - alone.n_targets).abs()),
            "correct": float((counted - correct).abs()),
            "gradients": max(float((g / 2 - expected[n]).abs().max()) for n, g in gradients.items()),
            "token losses": float((out.token_losses - alone.token_losses).abs().max()),
            "logits": float((logits - whole).abs().max()),
        }
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    first, second = run_ranks(differences, 2)
    assert first == second
    return first  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(found: dict[str, dict[str, float]], name: str) -> None:
    assert found[name] == pytest.approx(dict.fromkeys(found[name], 0.0), abs=1e-10)
