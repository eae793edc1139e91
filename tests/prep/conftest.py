import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from llmtrain.prep.config import PrepRecipe, TokenizerTraining
from llmtrain.prep.run import run
from llmtrain.prep.train_tokenizer import train_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "x = 1", "\n", "def f():", "  return", "naïve", "日本", "3.14"]


def random_texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 200))) for _ in range(n)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory):
    """Folder of a byte-level BPE tokenizer with 300 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(random_texts(50), TokenizerTraining(vocab_size=300), folder)
    return folder


class Corpus:
    """Four files, about a megabyte, and a recipe that makes some twenty partitions of them."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.files = [folder / "docs" / f"{i}.jsonl" for i in range(4)]
        self.files[0].parent.mkdir()
        for i, path in enumerate(self.files):
            write_jsonl(path, random_texts(400, seed=i))
        self.base = {
            "out": str(folder / "out"),
            "max_seq_len": 64,
            "val_fraction": 0.1,
            "partition_bytes": 60_000,
            "size_limit": 20_000,
            "tokenizer": {"name": str(tokenizer)},
            "sources": [{"name": "docs", "files": [str(folder / "docs" / "*.jsonl")]}],
        }

    @property
    def out(self):
        return Path(self.base["out"])

    @property
    def partial(self):
        return self.out.parent / ".out.partial"

    def finished_shards(self):
        """Time of each shard of an unfinished output whose partition is finished.

        Others may be there: of a partition that was ended after its files had got their names. It is made again.
        """
        found = {}
        for marker in self.partial.rglob("done/tokens/*.json"):
            for split, made in json.loads(marker.read_text())["splits"].items():
                for shard in made["shards"]:
                    name = f"{split}/{(shard['zip_data'] or shard['raw_data'])['basename']}"
                    found[name] = (self.partial / name).stat().st_mtime_ns
        return found

    def recipe(self, **changes):
        return PrepRecipe.model_validate({**self.base, **changes})

    def file(self, **changes):
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**self.base, **changes}))
        return path

    def make(self, options=None, **changes):
        """Returns prep.json's content and what was printed."""
        console = Console(file=io.StringIO(), width=200)
        content = run(self.recipe(**changes), console, options)
        return content, console.file.getvalue()

    def reference(self, **changes):
        """The digest of what one process makes without interruption, elsewhere."""
        from llmtrain.prep.run import Options

        out = self.folder / "reference"
        self.make(Options(processes=1), **{**changes, "out": str(out)})
        return digest(out)


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def corpus(tmp_path, small_tokenizer):
    return Corpus(tmp_path, small_tokenizer)


@pytest.fixture(name="digest")
def _digest():
    return digest


@pytest.fixture(autouse=True)
def functions_of_our_own(monkeypatch):
    """Recipes in these tests name functions that the tests wrote; tests/test_trust.py has what happens without it."""
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
