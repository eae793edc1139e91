"""Memory of a worker: the same whatever the size of the corpus, and of a document."""

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from llmtrain.prep.config import TokenizerTraining
from llmtrain.prep.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

TEXT = "\n\n".join(topics[name] for name in sorted(topics))
MOST_MB = 100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(topics.values(), TokenizerTraining(vocab_size=2000), folder)
    return folder


def peak_mb(folder: Path, files: str, tokenizer: Path, *settings: str) -> float:
    """Most resident memory of `llmtrain prep` with one process, in 10^6 bytes."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"out: {folder}/out\nmax_seq_len: 2048\ntokenizer: {{name: {tokenizer}}}\n"
        f"sources: [{{name: corpus, files: ['{files}']}}]\n"
    )
    start = "from llmtrain.cli import main; main()"
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", start, "prep", str(recipe), "--processes", "1", *settings]
    done = subprocess.run([sys.executable, "-c", watch, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024 / 1e6


def corpus(path: Path, megabytes: int) -> str:
    """JSON lines of documents of about 3,000 characters."""
    documents = [TEXT[start : start + 3000] for start in range(0, len(TEXT) - 3000, 2700)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            written += file.write(json.dumps({"text": documents[number % len(documents)]}) + "\n")
            number += 1
    return str(path)


@pytest.mark.long
def test_a_corpus_ten_times_as_large_takes_no_more(tmp_path, tokenizer):
    found = {}
    for size in (10, 100):
        folder = tmp_path / str(size)
        folder.mkdir()
        found[size] = peak_mb(folder, corpus(folder / "corpus.jsonl", size), tokenizer)
    assert found[100] < 1.2 * found[10]
    assert found[100] < MOST_MB


@pytest.mark.long
@pytest.mark.parametrize("cut", ["stream", "documents"])
def test_a_document_of_200_mb_takes_no_more_than_one_of_10(tmp_path, tokenizer, cut):
    found = {}
    path = tmp_path / "long.txt"
    for size in (10, 200):
        with path.open("w", encoding="utf-8") as file:
            for _ in range(int(size * 1e6 / len(TEXT.encode())) + 1):
                file.write(TEXT)
        assert path.stat().st_size > size * 1e6
        found[size] = peak_mb(tmp_path, str(path), tokenizer, f"cut={cut}", "overwrite=true")
    assert found[200] < 1.2 * found[10]
    manifest = json.loads((tmp_path / "out" / "prep.json").read_text())
    counts = manifest["splits"]["train"]
    assert counts["documents"] == 1
    assert counts["bytes"] == path.stat().st_size
    assert counts["samples"] > 10_000
