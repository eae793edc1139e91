"""A mixture in a file of its own."""

from pathlib import Path

import pytest
import yaml

from llmtrain.config.problems import ConfigError
from llmtrain.recipe.check import check
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.schema import json_schema

MIXTURE = """\
streams:
  books:
    local: data/books
    proportion: 3
  code:
    local: data/code
    proportion: 1
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = Path("recipe.yaml")
    file.write_text("""\
max_seq_len: 16
model: {d_model: 16, n_heads: 2, n_layers: 1, vocab_size: 64}
tokenizer: {name: t}
train_loader:
  dataset:
    streams: mixes/first.yaml
optimizer: {name: decoupled_adamw, lr: 1e-3}
scheduler: {name: cosine_with_warmup, t_warmup: 2ba, alpha_f: 0.1}
max_duration: 3ba
global_train_batch_size: 2
device_train_microbatch_size: 1
""")
    Path("mixes").mkdir()
    Path("mixes/first.yaml").write_text(MIXTURE)
    return file


def mixture_of(recipe: Path, *overrides: str) -> dict[str, tuple[str, float]]:
    streams = load_recipe(recipe, overrides).train_loader.dataset.streams
    return {name: (stream.local, stream.proportion) for name, stream in streams.items()}


def test_a_recipe_names_the_file(recipe: Path) -> None:
    expected = {"books": ("data/books", 3), "code": ("data/code", 1)}
    assert mixture_of(recipe) == expected
    Path("other.yaml").write_text(MIXTURE.replace("books", "news"))
    assert list(mixture_of(recipe, "train_loader.dataset.streams=other.yaml")) == ["news", "code"]


def test_check_shows_the_streams_and_what_it_shows_is_a_recipe(recipe: Path) -> None:
    shown = check(recipe)
    assert yaml.safe_load(shown)["train_loader"]["dataset"]["streams"]["books"]["proportion"] == 3
    Path("shown.yaml").write_text(shown)
    Path("mixes/first.yaml").unlink()  # a run's recipe.yaml does not need it
    assert list(mixture_of(Path("shown.yaml"))) == ["books", "code"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            MIXTURE.replace("proportion: 1", "proportion: -1"),
            "first.yaml:7: streams.code.proportion: -1\n.*number greater than 0",
        ),
        (MIXTURE.replace("local: data/code", "locl: data/code"), r"first.yaml:6: .*\n.*Did you mean `local`"),
        (MIXTURE.replace("    proportion: 1\n", ""), "these have none: code"),
        ("streams: {}\n", "streams is empty"),
        ("books: {local: data/books}\n", "no key `books`"),
        ("- books\n", "Expected a block of keys"),
        ("streams: [", "first.yaml.* Not valid YAML"),
        (None, "There is no such file"),
    ],
)
def test_mistakes_name_both_files(recipe: Path, text: str | None, said: str) -> None:
    file = Path("mixes/first.yaml")
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)recipe.yaml:6: train_loader.dataset.streams: .*" + said):
        load_recipe(recipe)


def test_the_schema_for_editors_allows_a_path_and_a_block() -> None:
    streams = json_schema()["$defs"]["TextDatasetConfig"]["properties"]["streams"]
    assert {"type": "string"} in streams["anyOf"]
    assert [kind["type"] for kind in streams["anyOf"]].count("object") == 1
