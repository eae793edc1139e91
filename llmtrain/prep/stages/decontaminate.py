"""`decontaminate`: documents that share n-grams of words with evaluation items are dropped.

n-grams as in GPT-3 (Brown et al. 2020, appendix C). GPT-3 cut an n-gram and 200 characters around it out of a document;
here the document is dropped: what is left of it is seldom worth the seams.
"""

from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.compressed import bare_suffix, unpacked
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.prep.stages.config import Decontaminate
from llmtrain.prep.stages.step import EXCERPT, Drop, Step, Verdict
from llmtrain.prep.stages.words import Hashes, WordHashes, n_grams, words
from llmtrain.prep.storage import glob_files, open_input

_TABLE_BITS = 22  # a table of 4 MiB says at once of most n-grams that no item holds them


def decontaminate(config: Decontaminate) -> Step:
    """Drops documents that share n-grams with an item; says which one.

    Raises:
        UserError: an evaluation file is missing or malformed, or no item is long enough.
    """
    hashes = WordHashes()
    places: list[str] = []
    found: dict[int, tuple[list[Hashes], list[int]]] = {}  # length of the n-grams -> those of items, and whose they are
    for place, text in _texts(config):
        hashed = hashes.of(words(text, joined=True))
        n = min(config.n_grams, len(hashed))
        if n < min(config.min_item_words, config.n_grams):
            continue
        grams, items = found.setdefault(n, ([], []))
        grams.append(n_grams(hashed, n))
        items.append(len(places))
        places.append(place)
    if not places:
        raise UserError(
            f"stage {config.name}: no text in {', '.join(config.files)} has {config.min_item_words} words "
            "(min_item_words): nothing would be looked for"
        )
    indexes = [_Index(n, *found[n]) for n in sorted(found, reverse=True)]

    def judge(text: str) -> Verdict:
        of_text = words(text, joined=True)
        hashed = hashes.of(of_text)
        matches = 0
        first: tuple[int, int, int] | None = None
        for index in indexes:
            positions, items, different = index.matches(hashed)
            matches += different
            if different and first is None:
                first = int(positions[0]), index.n, int(items[0])
        if first is None or matches < config.min_matches:
            return None
        position, n, item = first
        shared = " ".join(of_text[position : position + n])[:EXCERPT]
        place = places[item]
        return Drop(PurePath(place.rpartition(":")[0]).name, f"{matches} n-grams, first of {place}", shared)

    return judge


class _Index:
    """The n-grams of evaluation items for one n."""

    def __init__(self, n: int, grams: list[Hashes], items: list[int]) -> None:
        self.n = n
        owners = np.repeat(np.asarray(items, np.int64), [len(each) for each in grams])
        self._keys, first = np.unique(np.concatenate(grams), return_index=True)
        self._owners = owners[first]
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self._slots(self._keys)] = True

    def matches(self, hashed: Hashes) -> tuple[NDArray[np.intp], NDArray[np.int64], int]:
        """Positions of n-grams that an item holds, the first item that holds each, and how many are different."""
        grams = n_grams(hashed, self.n)
        positions = np.flatnonzero(self._table[self._slots(grams)])
        grams = grams[positions]
        at = np.minimum(np.searchsorted(self._keys, grams), len(self._keys) - 1)
        real = self._keys[at] == grams
        return positions[real], self._owners[at[real]], len(np.unique(at[real]))

    @staticmethod
    def _slots(grams: Hashes) -> NDArray[np.int64]:
        return (grams >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def files_of(config: Decontaminate) -> list[str]:
    """The evaluation files.

    Raises:
        UserError: a pattern matches none.
    """
    files = []
    for pattern in config.files:
        matching = [file.url for file in glob_files(pattern)]
        if not matching:
            raise UserError(f"stage {config.name}: files: {pattern}: no such file")
        files += matching
    return list(dict.fromkeys(files))


def _texts(config: Decontaminate) -> Iterator[tuple[str, str]]:
    """The place of an item (`eval.jsonl:3`), and one text of it."""
    for file in files_of(config):
        try:
            with unpacked(open_input(file), file) as opened:
                rows = _rows(opened, bare_suffix(PurePath(file)), file)
                yield from ((place, text) for place, row in rows for text in _texts_of(config, place, row))
        except (OSError, EOFError, UnicodeDecodeError) as problem:
            raise UserError(f"stage {config.name}: {file} cannot be read: {problem}") from problem


def _rows(opened: IO[bytes], suffix: str, file: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each item; a file that is neither a JSON array nor lines of JSON is one item."""
    if suffix not in {".jsonl", ".json"}:
        yield f"{file}:1", opened.read().decode()
        return
    lines: Iterable[bytes] = opened
    if suffix == ".json":
        content = opened.read()
        if content.lstrip().startswith(b"["):
            try:
                yield from ((f"{file}:{number}", row) for number, row in enumerate(parse_json(content), start=1))
            except ValueError as problem:
                raise UserError(f"{file} is not JSON: {problem}") from problem
            return
        lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", parse_json(line)
            except ValueError as problem:
                raise UserError(f"{file}:{number} is not JSON: {problem}") from problem


def _texts_of(config: Decontaminate, place: str, row: Any) -> list[str]:
    if config.columns is None or isinstance(row, str):
        return list(_strings(row))
    missing = [column for column in config.columns if not isinstance(row, dict) or column not in row]
    if missing:
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"stage {config.name}: {place} has no {', '.join(missing)}; it has {keys}")
    return [" ".join(text for column in config.columns for text in _strings(row[column]))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
