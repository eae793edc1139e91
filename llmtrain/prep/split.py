"""Which split a document belongs to, and the writing and counting of one split."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.prep.documents import Document
from llmtrain.prep.encode import Encoder
from llmtrain.prep.mds import ShardWriter
from llmtrain.prep.pack import Cutter, Packer


def is_validation(source: str, key: str, fraction: float) -> bool:
    """Whether a document is held out: depends on the source's name and the document's key alone."""
    name = f"{source}\0{key}".encode(errors="surrogatepass")  # names of files need not be UTF-8
    return bool(xxhash.xxh64_intdigest(name) < fraction * 2**64)


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """What one partition gave to one split."""

    documents: int = 0
    """Documents that went in."""
    bytes: int = 0
    """Their UTF-8 bytes."""
    tokens: int = 0
    """Their tokens, EOS and BOS included."""
    samples: int = 0
    """Rows written."""
    dropped_documents: int = 0
    """Documents with fewer than `min_document_tokens` tokens; they are not among `documents`."""
    short_documents: int = 0
    """Documents that went in and fill no row (`cut: documents`)."""
    dropped_tokens: int = 0
    """Tokens of the documents that went in, and are in no row."""
    repeated_tokens: int = 0
    """Tokens that are in two rows (`tail: overlap`)."""
    shard_bytes: int = 0
    """Size of the shards on disk."""

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SplitCounts(PartCounts):
    """What one split holds."""

    unigram_entropy_nats: float
    """Entropy of the distribution of the tokens in the rows, in nats: the loss of a model that knows nothing but it."""


@dataclass(frozen=True)
class SplitPart:
    """One partition's part of a split, as it is written."""

    counts: PartCounts
    tail: NDArray[Any]
    """Tokens that fill no row, (n,), n < seq_len; `join_tails` makes rows of them. Not counted as dropped."""
    token_counts: NDArray[np.int64]
    """How often each id is in the rows, (vocab_size,)."""
    shards: list[dict[str, Any]]
    """Entries of the index."""


def total(parts: Iterable[PartCounts], token_counts: NDArray[np.int64]) -> SplitCounts:
    """The counts of a split.

    Args:
        parts: of its partitions, that of the joined tails included.
        token_counts: the sum over the same.
    """
    parts = list(parts)
    sums = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(PartCounts)}
    share = token_counts[token_counts > 0] / max(1, token_counts.sum())
    return SplitCounts(**sums, unigram_entropy_nats=float(-(share * np.log(share)).sum()))


class _Rows:
    """Writes rows and counts their tokens."""

    def __init__(self, shards: ShardWriter, vocab_size: int) -> None:
        self.shards = shards
        self.token_counts: NDArray[np.int64] = np.zeros(vocab_size, np.int64)

    def write(self, rows: NDArray[Any] | None) -> None:
        if rows is not None and len(rows):
            self.token_counts += np.bincount(rows.reshape(-1), minlength=len(self.token_counts))
            self.shards.write(rows)

    def finish(self) -> list[dict[str, Any]]:
        self.shards.close()
        return self.shards.entries


class SplitWriter:
    """Cuts and writes one split of one partition, and counts.

    Args:
        shards: where the rows go.
        cutter: makes the rows.
        encoder: what the ids come from; says what stands around a document.
        min_document_tokens: documents with fewer tokens are dropped (BOS and EOS not counted).
    """

    def __init__(self, shards: ShardWriter, cutter: Cutter, encoder: Encoder, *, min_document_tokens: int) -> None:
        self._rows = _Rows(shards, encoder.vocab_size)
        self._cutter = cutter
        self._min_document_tokens = min_document_tokens
        self._before = np.array([] if encoder.bos is None else [encoder.bos], encoder.dtype)
        self._after = np.array([] if encoder.eos is None else [encoder.eos], encoder.dtype)
        self._documents = self._bytes = self._tokens = self._dropped = 0
        self._held: list[NDArray[Any]] | None = []  # the beginning of a long document; None once it is long enough
        self._held_bytes = 0

    def add(self, documents: Sequence[Document], ids: Sequence[NDArray[Any]]) -> None:
        """Append documents, and parts of long ones in their order, with the ids of each, (n,), without BOS and EOS."""
        framed: list[NDArray[Any]] = []
        lengths: list[int] = []
        around = len(self._before) + len(self._after)
        for document, tokens in zip(documents, ids, strict=True):
            if document.part != "whole":
                self._add_whole(framed, lengths)
                framed, lengths = [], []
                self._add_part(document, tokens)
            elif len(tokens) < self._min_document_tokens:
                self._dropped += 1
            else:
                framed += (self._before, tokens, self._after)
                lengths.append(len(tokens) + around)
                self._bytes += document.n_bytes
        self._add_whole(framed, lengths)

    def finish(self) -> SplitPart:
        """Write what is left; a split without a full row gets no shard."""
        self._rows.write(self._cutter.rows())
        shards = self._rows.finish()
        counts = PartCounts(
            documents=self._documents,
            bytes=self._bytes,
            tokens=self._tokens,
            samples=self._rows.shards.samples,
            dropped_documents=self._dropped,
            short_documents=self._cutter.short_documents,
            dropped_tokens=self._cutter.dropped,
            repeated_tokens=self._cutter.repeated,
            shard_bytes=self._rows.shards.bytes_written,
        )
        return SplitPart(counts, self._cutter.tail(), self._rows.token_counts, shards)

    def _add_whole(self, framed: list[NDArray[Any]], lengths: list[int]) -> None:
        if lengths:
            ids = np.concatenate(framed)
            self._documents += len(lengths)
            self._tokens += len(ids)
            self._rows.write(self._cutter.add(ids, np.array(lengths, np.int64)))

    def _add_part(self, document: Document, ids: NDArray[Any]) -> None:
        if document.part == "first":
            self._held, self._held_bytes = [], 0
        self._held_bytes += document.n_bytes
        last = document.part == "last"
        if self._held is not None:
            self._held.append(ids)
            if sum(map(len, self._held)) < self._min_document_tokens:
                self._dropped += last
                return
            ids = np.concatenate([self._before, *self._held])
            self._held = None
            self._documents += 1
        if last:
            ids = np.concatenate([ids, self._after])
        self._bytes += self._held_bytes
        self._held_bytes = 0
        self._tokens += len(ids)
        self._rows.write(self._cutter.add_part(ids, last=last))


def join_tails(shards: ShardWriter, seq_len: int, vocab_size: int, tails: Iterable[NDArray[Any]]) -> SplitPart:
    """Rows made of what was left over in the partitions, in their order; only what fills no row then is dropped."""
    rows, packer = _Rows(shards, vocab_size), None
    for tail in tails:
        packer = packer or Packer(seq_len, tail.dtype)
        rows.write(packer.add_part(tail, last=False))
    left = np.empty(0, np.uint16)
    if packer is not None:
        rows.write(packer.rows())
        left = packer.tail()
    entries = rows.finish()
    counts = PartCounts(samples=shards.samples, dropped_tokens=len(left), shard_bytes=shards.bytes_written)
    return SplitPart(counts, left, rows.token_counts, entries)
