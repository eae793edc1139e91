"""Documents joined end to end and cut into rows of one length."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GATHER = 1 << 18  # tokens that are collected before rows are cut: copies stay few, memory stays flat


class Packer:
    """Joins documents and cuts rows of `seq_len` tokens; a document goes on in the next row.

    Only the last, incomplete row is dropped; `tail` says how many tokens that are.
    """

    def __init__(self, seq_len: int, dtype: np.dtype[Any]) -> None:
        self._seq_len = seq_len
        self._dtype = dtype
        self._parts: list[NDArray[Any]] = []
        self.tail = 0
        """Tokens that wait for a row of their own."""

    def add(self, ids: NDArray[Any]) -> NDArray[Any] | None:
        """Append tokens, (n,); returns rows, (m, seq_len), once there are enough of them to be worth a copy."""
        self._parts.append(ids)
        self.tail += len(ids)
        return self.rows() if self.tail >= max(_GATHER, self._seq_len) else None

    def rows(self) -> NDArray[Any]:
        """All complete rows, (m, seq_len), m >= 0; what is left waits for more tokens."""
        joined = np.concatenate([np.empty(0, self._dtype), *self._parts]).astype(self._dtype, copy=False)
        cut = len(joined) // self._seq_len * self._seq_len
        rest = joined[cut:].copy()  # a view would keep the whole array alive
        self._parts = [rest]
        self.tail = len(rest)
        return joined[:cut].reshape(-1, self._seq_len)
