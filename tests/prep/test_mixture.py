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
from llmtrain.prep.run import Options, run
from llmtrain.prep.train_tokenizer import train_tokenizer


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


def test_other_weights_are_written_down_and_no_shard_is_made_again(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        for n in range(40):
            (tmp_path / name / f"{n}.txt").write_text(f"{name} number {n} says: " + "words and words. " * 20)
    train_tokenizer(["words and words. number says: b c 0123456789"] * 9, TokenizerTraining(vocab_size=270), tmp_path)

    def make(*, weights: list[dict[str, float]], options: Options | None = None) -> tuple[dict[str, Any], str]:
        files = [{"name": "books", "files": [f"{tmp_path}/b/*"]}, {"name": "code", "files": [f"{tmp_path}/c/*"]}]
        sources = [{**source, **weight} for source, weight in zip(files, weights, strict=True)]
        console = Console(file=io.StringIO(), width=200)
        made = recipe(tmp_path / "out", tokenizer={"name": str(tmp_path)}, sources=sources)
        content = run(made, console, options)
        return content, console.file.getvalue()  # type: ignore[attr-defined]

    def written() -> Any:
        return yaml.safe_load((tmp_path / "out/mixture.yaml").read_text())["streams"]

    def shards() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_ino) for path in (tmp_path / "out").rglob("*.zstd"))

    make(weights=[{}, {}], options=Options(only_plan=True))
    content, _ = make(weights=[{}, {"repeat": 2}])  # goes on with the plan
    assert written()["code"]["repeat"] == 2
    assert content["recipe"]["sources"][1]["repeat"] == 2
    made = shards()
    content, said = make(weights=[{"proportion": 3}, {"proportion": 1}])
    assert "mixture.yaml has the weights of the recipe now" in said
    assert {name: stream["proportion"] for name, stream in written().items()} == {"books": 3, "code": 1}
    assert "repeat" not in written()["code"]
    assert json.loads((tmp_path / "out/prep.json").read_text()) == content
    assert content["recipe"]["sources"][0]["proportion"] == 3
    (tmp_path / "out/mixture.yaml").write_text("streams: {}  # changed by hand")
    assert "nothing to do" in make(weights=[{"proportion": 3}, {"proportion": 1}])[1]
    assert written() == {}
    assert shards() == made
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["books", "code", "mixture.yaml", "prep.json"]
