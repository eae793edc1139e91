"""Plain text: every token of every document is predicted, and bits per byte are those of the text."""

import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from llmtrain.errors import UserError
from llmtrain.evaluation.evaluate import evaluate, n_bytes
from llmtrain.evaluation.text import TextTokens, is_text
from llmtrain.evaluation.token_bytes import bytes_of_ids
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.prep.fragments import LONG
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

TEXTS = ["the quick brown fox", "naïve 日本語 🙂, jumps over\n", "", "the lazy dog " * 20]


@pytest.fixture(scope="module")
def opened(tokenizer: Path):
    return load_tokenizer(TokenizerConfig(name=str(tokenizer)))


def written(folder: Path, kind: str) -> Path:
    if kind == "folder":
        for number, text in enumerate(TEXTS):
            if text:
                (folder / f"{number}.txt").write_text(text)
        (folder / "picture.png").write_bytes(b"\x89PNG")
        return folder
    path = folder / f"x.{kind}"
    rows = [{"body": text} for text in TEXTS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    return path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "jsonl.gz", "parquet"])
def test_documents_of_every_kind_of_file(kind: str, opened, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    assert is_text(path)
    tokens = TextTokens([str(path)], opened, column="body", vocab_size=400, name="x")
    expected = [opened(text, add_special_tokens=False)["input_ids"] for text in TEXTS if text]
    found = [tokens.read(number, 0, size).tolist() for number, size in enumerate(tokens.pieces)]
    assert found == [[opened.eos_token_id, *ids] for ids in expected]
    assert n_bytes(tokens, tokens.pieces) == {"x": sum(len(text.encode()) for text in TEXTS)}
    assert tokens.read(2, 5, 9).tolist() == found[2][5:9]
    table = bytes_of_ids(opened, 400)
    assert tokens.n_bytes(2, 5, 9) == table[found[2][5:9]].sum()


def test_bits_per_byte_are_those_of_the_logits(opened, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 300, "attn_config": {"alibi": True}}
    model = MPT(MPTConfig.model_validate(cfg)).eval()
    text = TEXTS[1] + TEXTS[0]
    (tmp_path / "x.txt").write_text(text)
    tokens = TextTokens([str(tmp_path / "x.txt")], opened, vocab_size=300, name="x")
    ids = torch.tensor([[opened.eos_token_id, *opened(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
    found = evaluate(model, tokens, 512)
    assert found.targets == ids.shape[1] - 1
    (n,) = n_bytes(tokens, tokens.pieces).values()
    bits = float(found.sums.sum()) / math.log(2) / n
    assert bits == pytest.approx(float(nats) / math.log(2) / len(text.encode()), rel=1e-6)


def test_a_long_document_is_read_in_parts_and_is_one_piece(opened, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dög. " * (2 * LONG // 45 + 30)
    (tmp_path / "x.txt").write_text(text)
    tokens = TextTokens([str(tmp_path / "x.txt")], opened, vocab_size=300, name="x")
    ids = opened(text, add_special_tokens=False)["input_ids"]
    assert tokens.pieces == [len(ids) + 1]
    assert tokens.read(0, 1, len(ids) + 1).tolist() == ids
    assert tokens.n_bytes(0, 1, len(ids) + 1) == len(text.encode())


def test_reading_stops_where_enough_was_read(opened, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "the quick brown fox"}\n' * 100)
    tokens = TextTokens([str(tmp_path / "x.jsonl")], opened, vocab_size=300, name="x", max_tokens=20)
    assert 20 <= sum(tokens.pieces) < 40


def test_mistakes_are_named(opened, tmp_path: Path) -> None:
    def read(path: Path, **settings) -> TextTokens:
        return TextTokens([str(path)], opened, **{"vocab_size": 300, "name": "x", **settings})

    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"holds neither shards .* nor text"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text in it"):
        read(tmp_path / "empty.txt")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2: .*'text'") as error:
        read(tmp_path / "x.jsonl")
    assert "on_error" not in str(error.value)
    (tmp_path / "x.txt").write_text("the quick brown fox")
    with pytest.raises(UserError, match=r"ids up to \d+, and the model has 100 embeddings"):
        read(tmp_path / "x.txt", vocab_size=100)
