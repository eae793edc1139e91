"""Which examples an epoch has, in which order, and which of them share a row.

All of it is a pure function of the lengths of the examples, the recipe, the seed and the number of the epoch: every
rank computes it for itself, and on any number of ranks the rows come in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.finetuning.config import FinetuningStreamConfig
from llmtrain.data.finetuning.packing import OnlinePacker
from llmtrain.errors import UserError


@dataclass(frozen=True)
class EpochPlan:
    """The rows of an epoch."""

    examples: NDArray[np.int64]
    """Numbers of the examples, row after row: counted through all sources."""
    starts: NDArray[np.int64]
    """Row i has the examples `starts[i]` to `starts[i + 1]`, (rows + 1,)."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """The examples of one row."""
        return self.examples[self.starts[number] : self.starts[number + 1]]


class EpochOrder:
    """Makes the plans of epochs.

    Args:
        lengths: tokens of each example, one array a source.
        draws: examples an epoch takes from each source, see `examples_an_epoch`.
        seq_len: tokens in a row.
        window: examples that are packed with each other; None: each example is a row.
        shuffle: whether the order is random.
    """

    def __init__(
        self,
        lengths: Sequence[NDArray[np.int64]],
        draws: Sequence[int],
        *,
        seq_len: int,
        window: int | None,
        shuffle: bool,
    ) -> None:
        self.lengths = np.concatenate([np.asarray(of_one, np.int64) for of_one in lengths])
        self.sizes = [len(of_one) for of_one in lengths]
        self.draws = list(draws)
        self.seq_len = seq_len
        self.window = window
        self.shuffle = shuffle

    def plan(self, epoch: int, seed: int, most_rows: int | None = None) -> EpochPlan:
        """The rows of an epoch.

        Args:
            epoch: from 0.
            seed: decides the order.
            most_rows: where packing needs more, all examples are packed at once, which takes fewer rows.
        """
        examples = self._examples(epoch, seed)
        if self.window is None:
            return EpochPlan(examples, np.arange(len(examples) + 1))
        plan = self._pack(examples, epoch, seed, self.window)
        if most_rows is not None and len(plan) > most_rows:
            plan = self._pack(examples, epoch, seed, len(examples))
        return plan

    def fewest_rows(self, seed: int) -> int:
        """Rows of the first epoch when all its examples are packed at once."""
        examples = self._examples(0, seed)
        return len(examples) if self.window is None else len(self._pack(examples, 0, seed, len(examples)))

    def _examples(self, epoch: int, seed: int) -> NDArray[np.int64]:
        first, parts = 0, []
        for source, (size, draw) in enumerate(zip(self.sizes, self.draws, strict=True)):
            parts.append(first + deal(size, draw, epoch, (seed, source), self.shuffle))
            first += size
        examples = np.concatenate(parts)
        return examples[random_of(seed, epoch, 1).permutation(len(examples))] if self.shuffle else examples

    def _pack(self, examples: NDArray[np.int64], epoch: int, seed: int, window: int) -> EpochPlan:
        packer = OnlinePacker(self.seq_len, window)
        rows = packer.add(self.lengths[examples].tolist(), examples.tolist()) + packer.finish()
        if self.shuffle:  # or the rows of a window would come together, and the emptiest last
            rows = [rows[number] for number in random_of(seed, epoch, 2).permutation(len(rows))]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(chain.from_iterable(rows), np.int64, len(examples))
        return EpochPlan(flat, np.concatenate([[0], counts.cumsum()]))


def deal(size: int, draw: int, epoch: int, seed: tuple[int, int], shuffle: bool) -> NDArray[np.int64]:
    """The examples that an epoch takes from a source: dealt like cards, on from where the last epoch stopped.

    A deck is every example once, shuffled; when it is used up, the next one begins. So what one epoch leaves out comes
    in the next, and no example is seen twice before all have been seen once.

    Args:
        size: examples of the source.
        draw: examples an epoch takes.
        epoch: from 0.
        seed: of the run, and number of the source.
        shuffle: without it each deck is in the order of the data.

    Returns:
        Numbers below `size`, (draw,).
    """
    start, stop = epoch * draw, (epoch + 1) * draw
    parts = []
    for deck in range(start // size, -(-stop // size)):
        cards = random_of(*seed, deck, 3).permutation(size) if shuffle else np.arange(size)
        parts.append(cards[max(start - deck * size, 0) : stop - deck * size])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def examples_an_epoch(
    streams: Sequence[FinetuningStreamConfig], sizes: Sequence[int], epoch_size: int | None
) -> list[int]:
    """How many examples an epoch takes from each source.

    With proportions they share `epoch_size` examples (all there are, when it is not given), rounded so that the sum is
    exact; otherwise `choose` examples, or `repeat` times all, or all.

    Raises:
        UserError: a source is so small a part that it would give nothing.
    """
    if all(stream.proportion is not None for stream in streams):
        share = np.array([stream.proportion for stream in streams], float)
        exact = (epoch_size or sum(sizes)) * share / share.sum()
        draws = np.floor(exact).astype(int)
        short = round(float(exact.sum())) - int(draws.sum())
        draws[np.argsort(draws - exact, kind="stable")[:short]] += 1
        counts = [int(draw) for draw in draws]
    else:
        counts = [
            stream.choose or round(size * (stream.repeat or 1)) for stream, size in zip(streams, sizes, strict=True)
        ]
    for number, count in enumerate(counts):
        if count == 0 and sizes[number]:
            raise UserError(
                f"stream number {number + 1} of {len(counts)} gives no example to an epoch: it has {sizes[number]:,}. "
                "Give it a larger proportion or repeat, or a larger epoch_size, or remove it"
            )
    return counts


def random_of(*seed: int) -> np.random.RandomState:
    """The legacy generator: its numbers are the same in every version of numpy."""
    return np.random.RandomState(np.array(seed, np.uint32))
