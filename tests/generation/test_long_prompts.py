"""Prompts beyond what was trained on, read in chunks: the same tokens, bounded memory, progress that is shown."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.generation import prefill_progress
from llmtrain.generation.command import generate_command
from llmtrain.generation.conversation import encode
from llmtrain.generation.decoder import CHUNK, CachedDecoder, RecomputingDecoder
from llmtrain.generation.generate import generate
from llmtrain.model.cache import SPARE
from llmtrain.model.kernels.interface import Visibility
from llmtrain.model.kernels.select import select
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

GROUPED_ROPE = {"rope": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi": True},
    "rope": GROUPED_ROPE,
    "rope-window": {**GROUPED_ROPE, "sliding_window_size": 200},
    "alibi-window": {"alibi": True, "sliding_window_size": 700},
}


def prompt(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(0, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_cache_give_the_tokens_of_whole_forwards(make_model: Any, kind: str) -> None:
    model = make_model(attn_config=KINDS[kind])
    chunked = generate(CachedDecoder(model, chunk=512), [prompt(3000)], max_new_tokens=4)
    assert chunked == generate(RecomputingDecoder(model), [prompt(3000)], max_new_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_prompt_beside_a_long_one(make_model: Any, kind: str) -> None:
    """Whole chunks of a short one are padding."""
    model, prompts = make_model(attn_config=KINDS[kind]), [prompt(n, seed=n) for n in (900, 3, 250)]
    beside = generate(CachedDecoder(model, chunk=100), prompts, max_new_tokens=6)
    assert beside == [generate(RecomputingDecoder(model), [p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize(
    ("attention", "kept"),
    [({"alibi": True}, 70_002), ({"rope": True, "sliding_window_size": 200}, 200 + SPARE + CHUNK)],
    ids=["alibi", "rope-window"],
)
@torch.no_grad()
def test_position_70_000(make_model: Any, attention: dict[str, Any], kept: int) -> None:
    model: MPT = make_model(d_model=16, n_heads=2, n_layers=1, attn_config=attention)
    ids, decoder = torch.tensor([prompt(70_000)]), CachedDecoder(model)
    (answer,) = generate(decoder, ids.tolist(), max_new_tokens=3)
    whole = torch.cat([ids, torch.tensor([answer[:-1]])], dim=1)
    logits = model(whole).logits
    assert answer == logits[0, -3:].argmax(-1).tolist()
    assert decoder.cache.length == 70_002
    assert decoder.cache.n_bytes == kept * 2 * 2 * 8 * 4


def test_on_a_gpu_a_chunk_takes_no_dense_bias() -> None:
    """Without ALiBi whole prompts and single tokens take torch's fused kernel, which has no chunks behind a cache."""

    def chosen(n_queries: int) -> str:
        return select("auto", Visibility(n_queries, 70_000, torch.device("cuda"), torch.bfloat16)).kernel.name

    assert chosen(70_000) == chosen(1) == "sdpa"
    assert chosen(CHUNK) in ("flex", "blockwise")


def test_progress_of_a_long_prompt(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_progress, "SECONDS_BEFORE", 0.0)
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "the quick brown fox " * 1000}) + "\n")
    generate_command(exported, prompts_file=file, max_new_tokens=2, output=tmp_path / "out.jsonl")
    first, *_, last = (line for line in capsys.readouterr().err.splitlines() if line.startswith("prompt: "))
    assert first.startswith("prompt: 2,048 of ")
    total = last.split()[1]
    assert last.startswith(f"prompt: {total} of {total} tokens read, ")
    assert last.endswith(" tokens/s")
    generate_command(exported, ["the quick"], max_new_tokens=2)
    assert capsys.readouterr().err == ""


def test_progress_is_silent_where_it_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    report = prefill_progress.PrefillProgress()
    for done in (0, 2048, 4000):
        report(done, 4000)
    assert capsys.readouterr().err == ""


def test_a_text_longer_than_the_training_length_needs_no_warning(
    tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = load_tokenizer(TokenizerConfig(name=str(tokenizer), kwargs={"model_max_length": 2}))
    logger = logging.getLogger("transformers")  # it does not propagate
    logger.addHandler(caplog.handler)
    try:
        assert len(encode(opened, "the quick brown fox")) > 2
        assert caplog.text == ""
        opened.encode("the quick brown fox")
        assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
