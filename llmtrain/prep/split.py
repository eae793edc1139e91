"""Which split a document belongs to, and the writing and counting of one split."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.prep.mds import ShardWriter
from llmtrain.prep.pack import Cutter


def is_validation(source: str, document: int, fraction: float) -> bool:
    """Whether a document is held out: depends on the source's name and the document's number alone."""
    return bool(xxhash.xxh64_intdigest(f"{source}\0{document}") < fraction * 2**64)


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds."""

    documents: int
    """Documents that went in."""
    bytes: int
    """Their UTF-8 bytes."""
    tokens: int
    """Their tokens, EOS and BOS included."""
    samples: int
    """Rows written."""
    dropped_documents: int
    """Documents with fewer than `min_document_tokens` tokens; they are not among `documents`."""
    short_documents: int
    """Documents that went in and fill no row (`cut: documents`)."""
    dropped_tokens: int
    """Tokens of the documents that went in, and are in no row."""
    repeated_tokens: int
    """Tokens that are in two rows (`tail: overlap`)."""
    shard_bytes: int
    """Size of the shards on disk."""
    unigram_entropy_nats: float
    """Entropy of the distribution of the tokens in the rows, in nats: the loss of a model that knows nothing but it."""

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


class SplitWriter:
    """Cuts and writes one split, and counts."""

    def __init__(self, shards: ShardWriter, cutter: Cutter, vocab_size: int) -> None:
        self._shards = shards
        self._cutter = cutter
        self._of_token: NDArray[np.int64] = np.zeros(vocab_size, np.int64)
        self._documents = self._bytes = self._tokens = self._dropped = 0

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64], *, n_bytes: int, dropped: int) -> None:
        """Append the framed tokens of some documents, (n,), which have these lengths."""
        self._documents += len(lengths)
        self._bytes += n_bytes
        self._tokens += len(ids)
        self._dropped += dropped
        self._write(self._cutter.add(ids, lengths))

    def finish(self) -> SplitCounts:
        """Write what is left and the index; a split without a full row gets neither."""
        self._write(self._cutter.rows())
        if self._shards.samples:
            self._shards.finish()
        share = self._of_token[self._of_token > 0] / max(1, self._of_token.sum())
        return SplitCounts(
            documents=self._documents,
            bytes=self._bytes,
            tokens=self._tokens,
            samples=self._shards.samples,
            dropped_documents=self._dropped,
            short_documents=self._cutter.short_documents,
            dropped_tokens=self._cutter.dropped,
            repeated_tokens=self._cutter.repeated,
            shard_bytes=self._shards.bytes_written,
            unigram_entropy_nats=float(-(share * np.log(share)).sum()),
        )

    def _write(self, rows: NDArray[Any] | None) -> None:
        if rows is not None and len(rows):
            self._of_token += np.bincount(rows.reshape(-1), minlength=len(self._of_token))
            self._shards.write(rows)
