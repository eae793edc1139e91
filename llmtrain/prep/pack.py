"""Documents cut into rows of one length: joined end to end, or each by itself."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_GATHER = 1 << 18  # tokens that are collected before rows are cut: copies stay few, memory stays flat


class Cutter(Protocol):
    """Tokens of documents in, rows out; both kinds count what comes into no row, and what comes into two."""

    @property
    def dropped(self) -> int:
        """Tokens that are in no row and will be in none."""

    @property
    def repeated(self) -> int:
        """Tokens that are in two rows."""

    @property
    def short_documents(self) -> int:
        """Documents that fill no row."""

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[Any] | None:
        """Take documents, joined to (n,), of these lengths, which add up to n; returns rows, (m, seq_len), or None."""

    def add_part(self, ids: NDArray[Any], *, last: bool) -> NDArray[Any] | None:
        """Take a part of one document, (n,), its last or not; returns rows, (m, seq_len), or None.

        The parts of a document follow each other.
        """

    def rows(self) -> NDArray[Any]:
        """All complete rows that wait, (m, seq_len), m >= 0."""

    def tail(self) -> NDArray[Any]:
        """After `rows`: tokens, (n,), n < seq_len, that would begin the next row."""


class Packer:
    """Joins documents and cuts rows of `seq_len` tokens; a document goes on in the next row."""

    dropped = 0
    repeated = 0
    short_documents = 0

    def __init__(self, seq_len: int, dtype: np.dtype[Any]) -> None:
        self._seq_len = seq_len
        self._dtype = dtype
        self._parts: list[NDArray[Any]] = []
        self._waiting = 0

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[Any] | None:
        """Append tokens, (n,); returns rows, (m, seq_len), once there are enough of them to be worth a copy."""
        return self.add_part(ids, last=True)

    def add_part(self, ids: NDArray[Any], *, last: bool) -> NDArray[Any] | None:
        """The same: nothing depends on where a document ends."""
        self._parts.append(ids)
        self._waiting += len(ids)
        return self.rows() if self._waiting >= max(_GATHER, self._seq_len) else None

    def rows(self) -> NDArray[Any]:
        """All complete rows, (m, seq_len), m >= 0; what is left waits for more tokens."""
        joined = np.concatenate([np.empty(0, self._dtype), *self._parts]).astype(self._dtype, copy=False)
        cut = len(joined) // self._seq_len * self._seq_len
        rest = joined[cut:].copy()  # a view would keep the whole array alive
        self._parts = [rest]
        self._waiting = len(rest)
        return joined[:cut].reshape(-1, self._seq_len)

    def tail(self) -> NDArray[Any]:
        """What `rows` left, (n,)."""
        return np.concatenate([np.empty(0, self._dtype), *self._parts])


class DocumentCutter:
    """Cuts each document by itself: a row of `seq_len` tokens holds text of one document only.

    Args:
        seq_len: tokens in a row.
        dtype: of the rows.
        overlap: what is left behind a document's last full row becomes a row that ends with the document, and begins
            with tokens that the row before it has, too. Otherwise it is dropped.
    """

    def __init__(self, seq_len: int, dtype: np.dtype[Any], *, overlap: bool) -> None:
        self._seq_len = seq_len
        self._dtype = dtype
        self._overlap = overlap
        self.dropped = 0
        self.repeated = 0
        self.short_documents = 0
        self._last_row: NDArray[Any] | None = None  # of a document of which the end has not come
        self._rest = np.empty(0, dtype)  # its tokens behind that row

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[Any] | None:
        """The rows of some documents; a document never waits for another."""
        full, left = np.divmod(lengths, self._seq_len)
        ends = np.cumsum(lengths)
        fits = full > 0
        # Row k of a document begins at k * seq_len of it.
        number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
        starts = np.repeat(ends - lengths, full) + number * self._seq_len
        if self._overlap:
            last = fits & (left > 0)
            starts = np.sort(np.concatenate([starts, ends[last] - self._seq_len]))
            self.repeated += int((self._seq_len - left[last]).sum())
            self.dropped += int(lengths[~fits].sum())
        else:
            self.dropped += int(left.sum())
        self.short_documents += int((~fits).sum())
        if not len(starts):
            return None
        found: NDArray[Any] = np.lib.stride_tricks.sliding_window_view(ids, self._seq_len)[starts]
        return found.astype(self._dtype, copy=False)

    def add_part(self, ids: NDArray[Any], *, last: bool) -> NDArray[Any] | None:
        """The rows that a part completes; at most two rows are kept for the next one."""
        joined = np.concatenate([self._rest, ids]).astype(self._dtype, copy=False)
        cut = len(joined) // self._seq_len * self._seq_len
        rows, rest = joined[:cut].reshape(-1, self._seq_len), joined[cut:]
        before = rows[-1] if len(rows) else self._last_row
        if not last:
            self._last_row = None if before is None else before.copy()
            self._rest = rest.copy()
            return rows if len(rows) else None
        self._last_row, self._rest = None, rest[:0].copy()
        if before is None:
            self.short_documents += 1
        if before is None or not self._overlap:
            self.dropped += len(rest)
        elif len(rest):
            self.repeated += self._seq_len - len(rest)
            rows = np.concatenate([rows, np.concatenate([before, rest])[None, -self._seq_len :]])
        return rows if len(rows) else None

    def rows(self) -> NDArray[Any]:
        """Nothing waits here."""
        return np.empty((0, self._seq_len), self._dtype)

    def tail(self) -> NDArray[Any]:
        """Nothing goes on in another document."""
        return np.empty(0, self._dtype)
