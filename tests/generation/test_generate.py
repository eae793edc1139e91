from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.generation.generate import generate
from llmtrain.generation.sampling import Sampling
from llmtrain.model.mpt import MPT

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18], [300, 2]]


def naive(model: MPT, prompt: list[int], count: int) -> list[int]:
    """Greedy, without cache, padding or batch."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes", [{}, {"attn_config": {}, "no_bias": False}, {"tie_word_embeddings": False, "n_heads": 2}]
)
def test_a_padded_batch_with_cache_equals_one_by_one_without(make_model, changes: dict) -> None:
    model = make_model(**changes).double()
    assert generate(model, PROMPTS, max_new_tokens=20) == [naive(model, prompt, 20) for prompt in PROMPTS]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_any_lengths_beside_each_other(make_model, lengths: list[int], seed: int) -> None:
    model = make_model().double()
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(384, (n,), generator=generator).tolist() for n in lengths]
    assert generate(model, prompts, max_new_tokens=4) == [naive(model, prompt, 4) for prompt in prompts]


def test_rows_end_at_eos_alone(model: MPT) -> None:
    free = generate(model, PROMPTS, max_new_tokens=12)
    eos = free[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=12, eos_ids=[eos])
    for row, full in zip(stopped, free, strict=True):
        end = full.index(eos) + 1 if eos in full else len(full)
        assert row == full[:end]
    assert min(map(len, stopped)) < 12


def test_the_same_seed_gives_the_same_tokens_and_others_do_not(model: MPT) -> None:
    hot = Sampling(temperature=1.5)
    first = generate(model, PROMPTS, max_new_tokens=15, sampling=hot, seed=7)
    assert first == generate(model, PROMPTS, max_new_tokens=15, sampling=hot, seed=7)
    others = [generate(model, PROMPTS, max_new_tokens=15, sampling=hot, seed=seed) for seed in (8, 9, 10)]
    assert all(other != first for other in others)


def test_equal_prompts_in_a_batch_get_different_samples(model: MPT) -> None:
    rows = generate(model, [[5, 6]] * 4, max_new_tokens=15, sampling=Sampling(temperature=1.5))
    assert len({tuple(row) for row in rows}) == 4


def test_sampling_does_not_depend_on_the_batch(make_model) -> None:
    model = make_model().double()
    hot = Sampling(temperature=1.5, top_p=0.95)
    together = generate(model, PROMPTS, max_new_tokens=15, sampling=hot, seed=3)
    alone = [
        generate(model, [prompt], max_new_tokens=15, sampling=hot, seed=3, first_index=i)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone


def test_alibi_goes_beyond_the_training_length(model: MPT) -> None:
    prompt = list(range(60))
    assert generate(model.double(), [prompt], max_new_tokens=30) == [naive(model, prompt, 30)]


def test_learned_positions_end(make_model) -> None:
    model = make_model(attn_config={"alibi": False})
    assert len(generate(model, [list(range(60))], max_new_tokens=5)[0]) == 5
    with pytest.raises(UserError, match="64 learned positions"):
        generate(model, [list(range(60))], max_new_tokens=6)


def test_nothing_to_do(model: MPT) -> None:
    assert generate(model, [], max_new_tokens=3) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[]], max_new_tokens=3)


@pytest.mark.parametrize("eos", [None, "seen"])
def test_32_greedy_tokens_equal_transformers_on_the_export(exported: Path, model: MPT, eos: str | None) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    ours = generate(model, PROMPTS, max_new_tokens=32)
    end = ours[2][9] if eos else None
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    theirs.generation_config.eos_token_id = end
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)[:, longest:]
    ours = generate(model, PROMPTS, max_new_tokens=32, eos_ids=[end] if eos else [])
    assert [row[: len(mine)] for row, mine in zip(found.tolist(), ours, strict=True)] == ours
    assert (min(map(len, ours)) < 32) == bool(eos)
