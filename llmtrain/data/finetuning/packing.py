"""Bin packing: which examples share a row.

Best-fit-decreasing over a window of examples: the longest first, each into the fullest row that still has room for it.
Rows that stay much emptier than they need to wait for the next window, so nothing is cut and nothing is thrown away.
(Best-fit-decreasing never needs more than 11/9 of the fewest rows possible, plus four: Johnson, Demers, Ullman, Garey,
Graham, "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974. On lengths of conversations
it is within half a percent: scripts/benchmark/packing.py.)
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

_WAITING_ROWS = 16
"""A window of n examples leaves at most n / 16 rows waiting."""
_MAY_WAIT = 64
"""A row waits if more than one token in 64 is missing."""


@dataclass
class _Bin:
    used: int
    examples: list[int]


class OnlinePacker:
    """Packs examples as they come.

    A pure function of the lengths that it is given, in their order: how they are cut into calls makes no difference.

    Args:
        seq_len: tokens in a row.
        window: examples that are packed with each other.
    """

    def __init__(self, seq_len: int, window: int) -> None:
        self.seq_len = seq_len
        self.window = window
        self._given = 0
        self._pending: list[tuple[int, int]] = []  # (example, length), fewer than a window
        self._waiting: list[_Bin] = []

    def add(self, lengths: Iterable[int], examples: Iterable[int] | None = None) -> list[list[int]]:
        """Take more examples.

        Args:
            lengths: tokens of each, between 1 and `seq_len`.
            examples: a number for each; when left out they are counted from 0 over all calls.

        Returns:
            The rows that are finished: the numbers of the examples of each.

        Raises:
            ValueError: a length is not between 1 and `seq_len`.
        """
        lengths = [int(length) for length in lengths]
        if lengths and (min(lengths) < 1 or max(lengths) > self.seq_len):
            wrong = next(length for length in lengths if not 1 <= length <= self.seq_len)
            raise ValueError(f"an example of {wrong} tokens does not go into rows of {self.seq_len}")
        numbers = range(self._given, self._given + len(lengths)) if examples is None else map(int, examples)
        self._pending += zip(numbers, lengths, strict=True)
        self._given += len(lengths)
        rows: list[list[int]] = []
        start = 0
        while len(self._pending) - start >= self.window:
            rows += self._pack(self._pending[start : start + self.window])
            start += self.window
        del self._pending[:start]
        return rows

    def finish(self) -> list[list[int]]:
        """The rows of all examples that are still here; afterwards there are none."""
        rows = self._pack(self._pending) if self._pending else []
        rows += [row.examples for row in self._waiting]
        self._pending, self._waiting = [], []
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rows to come depend on: plain numbers and lists."""
        return {
            "seq_len": self.seq_len,
            "window": self.window,
            "given": self._given,
            "pending": [[number, length] for number, length in self._pending],
            "waiting": [[row.used, list(row.examples)] for row in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another packer stood; `seq_len` and `window` are the other's from now on."""
        self.seq_len, self.window, self._given = int(state["seq_len"]), int(state["window"]), int(state["given"])
        self._pending = [(int(number), int(length)) for number, length in state["pending"]]
        self._waiting = [_Bin(int(used), [int(number) for number in numbers]) for used, numbers in state["waiting"]]

    def examples(self) -> list[int]:
        """The examples that were given and are not in a finished row yet."""
        return [*chain.from_iterable(row.examples for row in self._waiting), *(number for number, _ in self._pending)]

    def _pack(self, window: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Best-fit-decreasing of a window into the waiting rows and new ones; returns the rows that wait no longer."""
        bins = self._waiting
        lengths = np.fromiter((length for _, length in window), np.int64, len(window))
        order = np.argsort(-lengths, kind="stable").tolist()
        # Rows with room, emptiest last: the room above, the number of the row in the lower 32 bits.
        room = sorted((self.seq_len - row.used) << 32 | number for number, row in enumerate(bins))
        shortest = int(lengths.min())
        for place in order:
            example, length = window[place]
            best = bisect_left(room, length << 32)
            if best == len(room):
                number, left = len(bins), self.seq_len - length
                bins.append(_Bin(length, [example]))
            else:
                entry = room.pop(best)
                number = entry & 0xFFFFFFFF
                row = bins[number]
                row.used += length
                row.examples.append(example)
                left = (entry >> 32) - length
            if left >= shortest:
                insort(room, left << 32 | number)
        return self._release(len(window))

    def _release(self, window: int) -> list[list[int]]:
        bins = self._waiting
        enough = self.seq_len - self.seq_len // _MAY_WAIT
        emptiest = sorted(range(len(bins)), key=lambda number: bins[number].used)[: window // _WAITING_ROWS]
        stay = {number for number in emptiest if bins[number].used < enough}
        self._waiting = [row for number, row in enumerate(bins) if number in stay]
        return [row.examples for number, row in enumerate(bins) if number not in stay]
