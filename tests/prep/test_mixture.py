"""Several sources: how much of each is seen, in the file that the loader takes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console

from llmtrain.data.config import TextDatasetConfig
from llmtrain.prep.config import PrepRecipe, PrepTokenizer, TokenizerTraining
from llmtrain.prep.mixture import mixture_yaml
from llmtrain.prep.run import run


def recipe(out: Any = "data/two", **changes: Any) -> PrepRecipe:
    settings = {
        "out": str(out),
        "max_seq_len": 16,
        "tokenizer": {"name": "t"},
        "split_by_source": True,
        "val_fraction": 0.2,
        "sources": [{"name": "books", "files": ["b/*"]}, {"name": "code", "files": ["c/*"], "repeat": 2}],
    }
    return PrepRecipe.model_validate({**settings, **changes})


def streams(made: PrepRecipe) -> Any:
    text = mixture_yaml(made)
    assert text is not None
    return yaml.safe_load(text)["streams"]


def test_weights_and_places() -> None:
    assert streams(recipe()) == {
        "books": {"local": "data/two/books/train"},
        "code": {"local": "data/two/code/train", "repeat": 2},
    }
    shared = [
        {"name": "1", "files": ["b"], "proportion": 0.125},
        {"name": "2", "files": ["c"], "proportion": 7},
        {"name": "3", "files": ["d"], "proportion": 1, "into": "val"},
    ]
    assert streams(recipe("s3://bucket/two/", sources=shared)) == {
        "1": {"remote": "s3://bucket/two/1/train", "proportion": 0.125},
        "2": {"remote": "s3://bucket/two/2/train", "proportion": 7},
    }
    assert mixture_yaml(recipe(split_by_source=False, sources=[{"name": "books", "files": ["b/*"]}])) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split_by_source": False}, "repeat is applied by the loader, source by source"),
        ({"sources": [{"name": "a", "files": ["b"], "repeat": 2, "proportion": 1}]}, "give proportion or repeat"),
        ({"sources": [{"name": "a", "files": ["b"], "repeat": 0}]}, "greater than 0"),
    ],
)
def test_weights_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(**changes)


def test_the_file_is_written_and_the_loader_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "c"):
        Path(name).mkdir()
        for n in range(40):
            Path(name, f"{n}.txt").write_text(f"{name} number {n} says: " + "words and words. " * 20)
    tokenizer = PrepTokenizer(train=TokenizerTraining(vocab_size=290))
    console = Console(file=io.StringIO(), width=200)
    run(recipe("out", tokenizer=tokenizer.model_dump()), console)
    cfg = TextDatasetConfig(max_seq_len=16, streams="out/mixture.yaml")  # type: ignore[arg-type]
    assert cfg.streams is not None
    assert {name: (stream.local, stream.repeat) for name, stream in cfg.streams.items()} == {
        "books": ("out/books/train", None),
        "code": ("out/code/train", 2),
    }
    for stream in cfg.streams.values():
        assert json.loads(Path(str(stream.local), "index.json").read_text())["shards"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "streams: out/mixture.yaml" in said
    printed = yaml.safe_load(said[said.index("train_loader:") :])
    assert TextDatasetConfig.model_validate(printed["train_loader"]["dataset"]).streams == cfg.streams
    assert set(printed["eval_loader"]["dataset"]["streams"]) == {"books", "code"}
