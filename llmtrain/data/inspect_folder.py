"""One folder of shards, read once from end to end: checked, counted, and a few rows kept."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.inspect_counts import Documents, Lengths, Vocabulary, outside, spread
from llmtrain.data.mds_files import Damage, read_index
from llmtrain.data.verify import Checked, Sound, manifest_of, sound_shards
from llmtrain.errors import UserError

_PARTITION = re.compile(r"shard\.(\d+)\.\d+\.mds")


class Sample(NamedTuple):
    """A row to be shown."""

    shard: str
    row: int
    """In its shard."""
    ids: NDArray[Any] | None
    """(length,), or None for text."""
    texts: Mapping[str, Any]
    """Column -> value, for text."""


@dataclass
class Contents:
    """What a folder holds."""

    checked: Checked
    name: str
    """Short, for tables: the part of the path that differs between folders."""
    about: dict[str, Any]
    """What `llmtrain prep` said about it in its index, or in `prep.json`; empty for shards of another origin."""
    eos: int | None
    kind: Literal["tokens", "text"] = "tokens"
    encodings: dict[str, str] = field(default_factory=dict)
    """Column -> encoding."""
    compression: str | None = None
    raw_bytes: int = 0
    """Size of the shards, decompressed."""
    rows: int = 0
    """Rows that were read: those of sound shards."""
    row_lengths: Lengths = field(default_factory=Lengths)
    """Tokens of rows; bytes of texts."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    documents: Documents | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def lengths(self) -> tuple[Literal["documents", "rows"], Lengths]:
        """Lengths of documents where they can be told apart, otherwise of rows."""
        if self.documents is not None and self.documents.lengths.n:
            return "documents", self.documents.lengths
        return "rows", self.row_lengths


def read_folder(
    folder: Path,
    *,
    name: str,
    eos: int | None,
    vocab_size: int | None,
    samples: int,
    bytes_dtype: np.dtype[Any],
    advance: Callable[[int], None],
) -> Contents:
    """Read a folder, one shard in memory at a time; damaged shards are taken down and left out.

    Args:
        folder: with an index.
        name: see Contents.
        eos: ends each document; by default what the index says.
        vocab_size: ids there are; by default what the index says.
        samples: rows to keep, spread over all.
        bytes_dtype: of the ids, for columns of plain bytes.
        advance: is called with the bytes that were done since the last call.

    Raises:
        UserError: an id is outside of the vocabulary, or the rows are neither tokens nor text.
    """
    checked = Checked(folder)
    contents = Contents(checked, name, {}, eos)
    try:
        index = read_index(folder)
    except Damage:
        index = None
    wanted: list[int] = []
    firsts = [0]
    if index is not None and index.shards:
        first = index.shards[0]
        made = manifest_of(folder)
        contents.about = index.about or ({} if made is None else made[1])
        contents.encodings = dict(zip(first.column_names, first.column_encodings, strict=True))
        contents.compression = first.compression
        contents.raw_bytes = sum(shard.raw_data.bytes for shard in index.shards)
        contents.kind = _kind(folder, contents.encodings)
        firsts = np.cumsum([0, *(shard.samples for shard in index.shards)]).tolist()
        wanted = list(spread(firsts[-1], samples))
    if contents.eos is None:
        contents.eos = contents.about.get("eos_token_id")
    if vocab_size is None:
        vocab_size = contents.about.get("vocab_size")
    if contents.kind == "tokens" and contents.eos is not None and contents.about.get("cut", "stream") == "stream":
        contents.documents = Documents(contents.eos)
    ours = index is not None and bool(index.about)
    before: tuple[int, str] | None = None
    for shard in sound_shards(checked, advance):
        if before is not None and _interrupted(before, shard, ours) and contents.documents is not None:
            contents.documents.interrupt()
        kept = [row - firsts[shard.number] for row in wanted if 0 <= row - firsts[shard.number] < shard.entry.samples]
        try:
            if contents.kind == "tokens":
                _count_tokens(contents, shard, kept, vocab_size, bytes_dtype)
            else:
                _count_text(contents, shard, kept)
        except Damage as damage:
            checked.damaged(shard.entry.name, str(damage))
        before = (shard.number, shard.entry.raw_data.basename)
        del shard  # or two of them would be in memory while the next one is read
    if contents.documents is not None:
        contents.documents.interrupt()
    return contents


def _kind(folder: Path, encodings: Mapping[str, str]) -> Literal["tokens", "text"]:
    if "tokens" in encodings:
        return "tokens"
    if {"str", "json"} & set(encodings.values()):
        return "text"
    names = ", ".join(encodings) or "none"
    raise UserError(f"{folder}: neither a column 'tokens' nor one of text; its columns are {names}")


def _interrupted(before: tuple[int, str], now: Sound, ours: bool) -> bool:
    """Whether a shard does not go on where the one before it stopped.

    A damaged one was left out, or (in what `llmtrain prep` wrote) another partition begins: what fills no row at the
    end of one stands in the last partition, together with that of all others. So of the document that a partition's
    end cuts, that part counts there.
    """
    number, name = before
    if now.number != number + 1:
        return True
    parts = [_PARTITION.match(name) for name in (name, now.entry.raw_data.basename)]
    return ours and None not in parts and len({part[1] for part in parts if part}) > 1


def _count_tokens(
    contents: Contents, shard: Sound, kept: list[int], vocab_size: int | None, bytes_dtype: np.dtype[Any]
) -> None:
    start = 0
    for ids in shard.rows.tokens(bytes_dtype):
        if ids.dtype.kind not in "iu":
            raise UserError(f"{contents.checked.folder / shard.entry.name}: column 'tokens' is of {ids.dtype}, no ids")
        bad = outside(ids, vocab_size)
        if bad is not None:
            size = "what any vocabulary has" if vocab_size is None else f"the vocabulary of {vocab_size:,}"
            raise UserError(
                f"{contents.checked.folder / shard.entry.name}, row {start + bad[0]}: token id {bad[1]} is outside of "
                f"{size}. Were these shards made with another tokenizer (--tokenizer)"
                + (", or is --token-encoding-type wrong?" if contents.encodings.get("tokens") == "bytes" else "?")
            )
        contents.vocabulary.add(ids)
        contents.row_lengths.add(np.full(len(ids), ids.shape[1], np.int64))
        if contents.documents is not None:
            contents.documents.add(ids)
        for row in kept:
            if start <= row < start + len(ids):
                contents.samples.append(Sample(shard.entry.name, row, ids[row - start].astype(np.int64), {}))
        start += len(ids)
    contents.rows += start


def _count_text(contents: Contents, shard: Sound, kept: list[int]) -> None:
    lengths = np.zeros(shard.entry.samples, np.int64)
    for row in range(shard.entry.samples):
        texts = shard.rows.texts(row)
        lengths[row] = sum(len(text.encode()) for text in _strings(texts))
        if row in kept:
            contents.samples.append(Sample(shard.entry.name, row, None, texts))
    contents.row_lengths.add(lengths)
    contents.rows += len(lengths)


def _strings(value: Any) -> list[str]:
    """The texts in a value of a row: of `messages` what was said, not who said it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        if "content" in value:
            return _strings(value["content"])
        return [text for each in value.values() for text in _strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in _strings(each)]
    return []
