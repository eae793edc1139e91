"""The modelling file in use: fine-tuning, saving again, generation in all its forms, long texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.model.mpt import MPT

from .conftest import Written

OPTIONS: dict[str, Any] = {
    "attn_config": {"alibi": True, "alibi_bias_max": 16, "qk_ln": True, "clip_qkv": 1.0},
    "no_bias": False,
    "logit_scale": 0.5,
}


def ours_and_theirs(made: Written, **options: Any) -> tuple[MPT, Any]:
    from transformers import AutoModelForCausalLM

    folder, _, config, weights = made
    ours = MPT(config)
    ours.load_state_dict(weights)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_ours(written: Callable[..., Written], recompute: bool) -> None:
    ours, theirs = ours_and_theirs(written(**OPTIONS, embedding_fraction=0.3))
    if recompute:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    theirs.train()
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(24) < 5, -100)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels[1, 20:] = -100
    mine = ours(ids, labels=labels, attention_mask=mask).loss
    found = theirs(input_ids=ids, labels=labels, attention_mask=mask).loss
    assert mine is not None
    torch.testing.assert_close(found, mine, rtol=1e-5, atol=1e-6)
    mine.backward()
    found.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_saved_again_it_opens_again(written: Callable[..., Written], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = written(**OPTIONS, tie_word_embeddings=False)
    _, theirs = ours_and_theirs(made)
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_llmtrain.py").read_bytes() == (made[0] / "modeling_llmtrain.py").read_bytes()
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {n: v.tolist() for n, v in again.state_dict().items()} == {n: v.tolist() for n, v in made[3].items()}


def test_generation_with_beams_and_without_a_cache(written: Callable[..., Written]) -> None:
    _, theirs = ours_and_theirs(written(**OPTIONS))
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def generate(**options: Any) -> list[list[int]]:
        return theirs.generate(ids, attention_mask=mask, **how, **options)[:, 20:].tolist()  # type: ignore[no-any-return]

    assert generate() == generate(use_cache=False)
    assert generate(num_beams=3) == generate(num_beams=3, use_cache=False)
    alone = theirs.generate(ids[1:, 7:], attention_mask=mask[1:, 7:], **how)[:, 13:].tolist()
    assert alone == generate()[1:]


def test_a_static_cache_and_too_many_learned_positions_are_refused(written: Callable[..., Written]) -> None:
    _, theirs = ours_and_theirs(written())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="static caches are not supported"):
        theirs.generate(ids, max_new_tokens=4, cache_implementation="static", pad_token_id=0, disable_compile=True)
    with pytest.raises(ValueError, match="80 learned positions"):
        theirs(input_ids=torch.zeros(1, 81, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_mask is"):
        theirs(input_ids=ids, attention_mask=torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_beyond_the_trained_length(written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rotary positions that go by a row's length; and attention in slices of queries."""
    import sys

    scaling = {"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": kind, "factor": 2.0}}
    ours, theirs = ours_and_theirs(written(attn_config=scaling))
    ids = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    with torch.inference_mode():
        wanted = ours(ids, attention_mask=mask).logits
        found = theirs(input_ids=ids, attention_mask=mask).logits
        monkeypatch.setattr(sys.modules[type(theirs).__module__], "SCORES", 2 * 4 * 200 * 7)
        in_slices = theirs(input_ids=ids, attention_mask=mask).logits
    assert wanted is not None
    real = mask.bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=5e-5)
    torch.testing.assert_close(in_slices[real], found[real], rtol=0, atol=5e-5)


def test_bfloat16(written: Callable[..., Written]) -> None:
    """The bias stays in float32: rounded to bfloat16, ALiBi's distances would be off by up to 0.4 percent."""
    made = written(**OPTIONS)
    ours, theirs = ours_and_theirs(made)
    ids = torch.randint(300, (1, 60), generator=torch.Generator().manual_seed(1))
    exact = theirs(input_ids=ids).logits
    narrow = theirs.bfloat16()(input_ids=ids).logits
    mine = ours.bfloat16()(ids).logits
    assert mine is not None
    assert narrow.dtype == torch.bfloat16
    scale = exact.abs().max()
    assert (narrow - exact).abs().max() / scale < 0.05
    assert (narrow.float() - mine.float()).abs().max() / scale < 0.05
