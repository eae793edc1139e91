"""A corpus of the text that a machine has, and a tokenizer trained on it: for prep.py, which says how they are made."""

import gzip
import html
import json
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

DEBIAN = (
    *("linux-doc", "python3-doc", "python3.11-doc", "perl-doc", "manpages", "manpages-dev", "bash-doc"),
    *("dict-gcide", "dict-foldoc", "dict-jargon", "debian-reference-en", "fortunes", "r-cran-janeaustenr"),
)
"""Packages that are nothing but text."""
EOS = "<|endoftext|>"
PARTS = 8
_PROSE = 0.7  # share of the corpus
_MEDIAN, _SIGMA = 1_300, 1.2  # characters of a document, log-normal: mean 2,700
_SHORTEST, _LONGEST = 64, 200_000
_OF_ONE_PACKAGE = 20_000_000  # bytes
_TAG = re.compile(r"<(script|style).*?</\1>|<[^>]{0,500}>", re.DOTALL)
_ROFF = re.compile(r'^[.\'](\\"|[a-zA-Z]{1,2}\b).{0,20}? ?|\\f.|\\[&|^]', re.MULTILINE)


def fetch_debian(folder: Path, packages: Sequence[str] = DEBIAN) -> list[str]:
    """Unpack packages, without installing them; gives the names of those that there are."""
    if not shutil.which("apt-get"):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if any(folder.glob(f"{package}*.deb")):
            continue
        if package == "linux-doc":  # depends on the kernel's version, and only the real one can be downloaded
            shown = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True).stdout
            package = next((line.split()[-1] for line in shown.splitlines() if "linux-doc-" in line), package)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, capture_output=True)
    unpacked = []
    for archive in sorted(folder.glob("*.deb")):
        target = folder / "root" / archive.name.split("_")[0]
        if not target.exists():
            target.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", archive, target], check=True)
        unpacked.append(target.name)
    return unpacked


def prose(folder: Path) -> Iterator[str]:
    """Texts of unpacked packages, the topics of pydoc, and the texts beside Python packages."""
    for path in _files(folder / "root"):
        text = _read(path)
        if text is None:
            continue
        if ".html" in path.name:
            text = html.unescape(_TAG.sub("", text))
        elif "/man/" in str(path):
            text = _ROFF.sub("", text)
        yield text
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[name] for name in sorted(topics))
    for path in _files(Path(sysconfig.get_path("purelib"))):
        if path.suffix in {".md", ".rst"} or (path.suffix == ".txt" and path.stat().st_size > 10_000):
            yield _read(path) or ""


def code() -> Iterator[str]:
    """Python sources: the standard library, and of each package that is installed here at most so much."""
    for key in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(key))
        taken: Counter[str] = Counter()
        for path in _files(root):
            if path.suffix != ".py" or (key == "stdlib" and "site-packages" in path.parts):
                continue
            package = path.relative_to(root).parts[0]
            taken[package] += path.stat().st_size
            if key == "stdlib" or taken[package] <= _OF_ONE_PACKAGE:
                yield _read(path) or ""


def build(folder: Path, megabytes: Sequence[float], debian: Path) -> dict[str, Any]:
    """Write `folder/NMB/corpus.jsonl`, the same in parts (`parts/*.jsonl`) and in files (`files/*.txt`), for each N.

    The corpora are the beginnings of one stream of documents; a document is a window of one text from a line's start.
    Windows overlap once the corpus is larger than the texts.

    Returns:
        What it is made of.
    """
    pools = [[text for text in source if len(text) >= 200] for source in (prose(debian), code())]
    stream = _documents(pools)
    about: dict[str, Any] = {
        "prose_mb": round(sum(map(len, pools[0])) / 1e6, 1),
        "code_mb": round(sum(map(len, pools[1])) / 1e6, 1),
        "sizes": {},
    }
    documents: list[str] = []
    n_bytes = 0
    for size in sorted(megabytes):
        while n_bytes < size * 1e6:
            documents.append(next(stream))
            n_bytes += len(documents[-1].encode())
        about["sizes"][f"{size:g}"] = {"documents": len(documents), "bytes": n_bytes}
        _write(folder / f"{size:g}MB", documents)
    return about


def train_tokenizer(corpus: Path, folder: Path, vocab_size: int, max_bytes: int = 40_000_000) -> None:
    """A tokenizer like GPT-NeoX's: byte-level BPE, NFC, runs of spaces as tokens, one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    runs = [AddedToken(" " * n, normalized=True, special=False) for n in range(24, 1, -1)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(runs),
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, max_bytes), trainer)
    tokenizer.add_tokens(runs)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": EOS for role in ("bos", "eos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _texts(corpus: Path, max_bytes: int) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]
            max_bytes -= len(line)
            if max_bytes < 0:
                return


def _documents(pools: list[list[str]]) -> Iterator[str]:
    random = np.random.default_rng(17)
    ends = [np.cumsum([len(text) for text in pool]) for pool in pools]
    while True:
        kind = int(random.random() >= _PROSE) if len(pools[0]) else 1
        length = int(np.clip(random.lognormal(np.log(_MEDIAN), _SIGMA), _SHORTEST, _LONGEST))
        place = int(random.integers(ends[kind][-1]))
        number = int(np.searchsorted(ends[kind], place, side="right"))
        text = pools[kind][number]
        start = text.rfind("\n", 0, place - int(ends[kind][number]) + len(text)) + 1
        document = text[start : start + length].strip()
        if len(document) >= _SHORTEST:
            yield document


def _write(folder: Path, documents: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "parts").mkdir(parents=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(lines)
    step = -(-len(lines) // PARTS)
    for number, start in enumerate(range(0, len(lines), step)):
        with (folder / "parts" / f"{number:02}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(lines[start : start + step])
    for number, text in enumerate(documents):
        path = folder / "files" / f"{number // 1000:03}" / f"{number:06}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _read(path: Path) -> str | None:
    """A file's text, or None where it is something else."""
    try:
        data = path.read_bytes()
        if path.suffix in {".gz", ".dz"}:
            data = gzip.decompress(data)
        text = data.decode("utf-8")
    except (OSError, EOFError, ValueError):
        return None
    return None if "\0" in text[:1000] else text
