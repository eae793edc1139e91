"""The packed chat twin: killed at 20 random points, then on one rank and on four."""

import json
from pathlib import Path

import pytest

from llmtrain.testing.corpus import TinyCorpus
from tests.certify.conftest import SMALL, Certify

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]


def conversations(file: Path, number: int) -> Path:
    """Conversations of different lengths, some of several turns."""
    rows = []
    for n in range(number):
        turns = []
        for turn in range(1 + n % 3):
            turns.append({"role": "user", "content": f"Count to {n % 7 + turn}, number {n}."})
            turns.append({"role": "assistant", "content": " ".join(map(str, range(n % 7 + turn + 1)))})
        rows.append({"messages": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_twenty_kills_and_other_ranks(certify: Certify, repository: Path, corpus: TinyCorpus, tmp_path: Path) -> None:
    files = conversations(tmp_path / "train.jsonl", 600), conversations(tmp_path / "val.jsonl", 60)
    data = [
        f"{loader}.dataset.{key}"
        for loader, file in zip(("train_loader", "eval_loader"), files, strict=True)
        for key in ("local=null", "split=null", f"files={file}", f"cache_dir={tmp_path / 'cache'}")
    ]
    made = certify(
        repository / "yamls/mpt-tiny-chat.yaml",
        *SMALL,
        *data,
        "max_seq_len=128",
        "model.pretrained=null",
        "model.vocab_size=640",
        "model.resid_pdrop=0.1",
        f"tokenizer.name={corpus.tokenizer}",
        "callbacks.generate_callback.interval=9ba",
        "callbacks.generate_callback.max_new_tokens=4",
        kills=20,
        steps=20,
        other_ranks="1",
        seed=3,
    )
    assert made.granted, (made.difference, made.problem)
    assert len(made.kills) == 20
    assert set(made.by_kind()) == {"step", "save", "evaluation", "start"}
    assert made.elastic_ranks == [2, 1]
    assert made.elastic_note is not None
    assert "model.resid_pdrop = 0" in made.elastic_note
