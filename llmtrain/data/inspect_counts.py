"""What is counted while shards are looked at, in memory that does not grow with them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_EXACT = 64  # lengths below have a bin each
_PER_OCTAVE = 64  # bins for each doubling from there: a quantile is off by 0.6% at most
_MOST = 1 << 24  # no vocabulary is larger; an array of this many counts is no problem


class Lengths:
    """How long documents or rows are: exact number, sum, least and most; quantiles within 0.6%."""

    def __init__(self) -> None:
        self.n = 0
        self.total = 0
        self.least = 0
        self.most = 0
        self._bins = np.zeros(_EXACT + 48 * _PER_OCTAVE, np.int64)

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count some lengths, (n,)."""
        if not len(lengths):
            return
        least, most = int(lengths.min()), int(lengths.max())
        self.least = least if not self.n else min(self.least, least)
        self.most = max(self.most, most)
        self.n += len(lengths)
        self.total += int(lengths.sum())
        octaves = np.log2(np.maximum(lengths, _EXACT) / _EXACT)
        bins = np.where(lengths < _EXACT, lengths, _EXACT + (octaves * _PER_OCTAVE).astype(np.int64))
        self._bins += np.bincount(bins, minlength=len(self._bins))

    @property
    def mean(self) -> float:
        """Their mean; 0 without any."""
        return self.total / max(1, self.n)

    def quantile(self, share: float) -> int:
        """The length that this share of them does not exceed, within 0.6%."""
        if not self.n:
            return 0
        number = int(np.searchsorted(self._bins.cumsum(), share * self.n))
        length = self._edges()[number]
        if number >= _EXACT:
            length *= 2 ** (0.5 / _PER_OCTAVE)  # the middle of the bin
        return min(max(round(float(length)), self.least), self.most)

    def histogram(self, per_octave: int) -> "Histogram":
        """Counts in bins of equal width on a logarithmic axis, from the shortest to the longest."""
        if not self.n:
            return Histogram([1, 2], [0])
        octaves = np.arange(48 * per_octave + 1)
        edges = np.unique(np.floor(2 ** (octaves / per_octave)).astype(np.int64))
        edges = np.concatenate([[0], edges]) if self.least == 0 else edges
        # The shortest length in a fine bin decides: a coarse edge lies on a fine one, or within the bin beside it.
        place = np.searchsorted(edges, np.ceil(self._edges() - 1e-9), side="right") - 1
        counts = np.bincount(np.maximum(place, 0), self._bins, minlength=len(edges)).astype(np.int64)
        used = np.flatnonzero(counts)
        first, last = int(used[0]), int(used[-1])
        return Histogram(edges[first : last + 2].tolist(), counts[first : last + 1].tolist())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        quantiles = {f"p{round(100 * share)}": self.quantile(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
        octaves = self.histogram(1)
        return {
            "n": self.n,
            "total": self.total,
            "least": self.least,
            "mean": self.mean,
            **quantiles,
            "most": self.most,
            "octaves": {"edges": octaves.edges, "counts": octaves.counts},
        }

    def _edges(self) -> NDArray[np.float64]:
        fine = np.arange(len(self._bins) - _EXACT)
        return np.concatenate([np.arange(_EXACT), _EXACT * 2.0 ** (fine / _PER_OCTAVE)])


class Histogram(NamedTuple):
    """Bin k holds `counts[k]` lengths with `edges[k] <= length < edges[k + 1]`."""

    edges: list[int]
    counts: list[int]


class Documents:
    """Lengths of the documents in rows that go on in the next row, told by the EOS that each ends with, EOS included.

    Args:
        eos: id of the token.
    """

    def __init__(self, eos: int) -> None:
        self.lengths = Lengths()
        self.cut = 0
        """Documents whose end is not among the rows, or not in the next one."""
        self._eos = eos
        self._open = 0

    def add(self, ids: NDArray[Any]) -> None:
        """Count some rows, (rows, length), in their order."""
        flat = ids.reshape(-1)
        ends = np.flatnonzero(flat == self._eos)
        if not len(ends):
            self._open += len(flat)
            return
        lengths = np.diff(ends, prepend=-1)
        lengths[0] += self._open
        self.lengths.add(lengths)
        self._open = len(flat) - 1 - int(ends[-1])

    def interrupt(self) -> None:
        """The next row does not go on where the last one stopped."""
        self.cut += self._open > 0
        self._open = 0


class Vocabulary:
    """How often each id occurs."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)

    def add(self, ids: NDArray[Any]) -> None:
        """Count ids of any shape; they are not negative, and below 2^24."""
        counts = np.bincount(ids.reshape(-1).astype(np.int64, copy=False), minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts

    def merge(self, other: "Vocabulary") -> None:
        """Add what another one counted."""
        longer, shorter = sorted((self.counts, other.counts), key=len, reverse=True)
        self.counts = longer.copy()
        self.counts[: len(shorter)] += shorter

    @property
    def total(self) -> int:
        """Tokens."""
        return int(self.counts.sum())

    @property
    def occurring(self) -> int:
        """Ids that occur at all."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Of the distribution of the tokens, in nats: the loss of a model that knows nothing but how often each is."""
        share = self.counts[self.counts > 0] / max(1, self.total)
        return float(-(share * np.log(share)).sum())

    def most_frequent(self, n: int) -> list[tuple[int, int]]:
        """Id and count of the most frequent ids, ties by id."""
        order = np.argsort(-self.counts, kind="stable")[:n]
        return [(int(token), int(self.counts[token])) for token in order if self.counts[token]]

    def by_rank(self) -> NDArray[np.int64]:
        """Counts in decreasing order, without zeros."""
        counts = np.sort(self.counts)[::-1]
        return counts[counts > 0]

    def share(self, token: int | None) -> float:
        """Of one id among all tokens."""
        if token is None or token >= len(self.counts):
            return 0.0
        return float(self.counts[token] / max(1, self.total))


def outside(ids: NDArray[Any], vocab_size: int | None) -> tuple[int, int] | None:
    """Row and value of the first id that no vocabulary (or not the given one) has, in rows (rows, length); or None."""
    if not ids.size:
        return None
    limit = _MOST if vocab_size is None else vocab_size
    if int(ids.max()) < limit and (ids.dtype.kind == "u" or int(ids.min()) >= 0):
        return None
    row, column = np.argwhere((ids >= limit) | (ids < 0))[0]
    return int(row), int(ids[row, column])


def spread(rows: int, k: int) -> Sequence[int]:
    """Numbers of k rows drawn from all, in their order; the same ones each time."""
    if not rows:
        return []
    return sorted(np.random.default_rng(0).choice(rows, min(k, rows), replace=False).tolist())
