"""An evaluation reads every row exactly once, on any number of ranks and workers.

Streaming repeats rows until all ranks have equally many, and Composer stops all ranks where the first one ends: the
measured rows would depend on the number of ranks and the batch size. Here rows that are missing to equal shares are
blank ones, without a target.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from llmtrain.data.guarded_streaming import GuardedDataset


def share(
    n_rows: int, *, batch_size: int, rank: int, ranks: int, worker: int = 0, workers: int = 1
) -> tuple[NDArray[np.int64], int]:
    """Which rows of an evaluation one worker of one rank reads.

    Rank r has the rows r, r + ranks, ..., so that batch b of all ranks together is the b-th run of `batch_size * ranks`
    rows: the first batches are the same rows for any number of ranks that share the same global batch. A DataLoader
    takes batch b from worker b modulo `workers`.

    Args:
        n_rows: Rows in all.
        batch_size: Rows in a batch of one rank.
        rank: Of this process.
        ranks: Number of them.
        worker: Of the rank.
        workers: Number of them per rank.

    Returns:
        Positions of the rows, in the order in which they are read, and the number of blank rows behind them (0 or 1):
        with these all ranks have equally many batches, and the batches of one turn equally many rows.
    """
    of_rank = np.arange(rank, n_rows, ranks, dtype=np.int64)
    length = -(-n_rows // ranks)
    of_worker = of_rank[np.arange(len(of_rank)) // batch_size % workers == worker]
    has_last_batch = (length - 1) // batch_size % workers == worker
    return of_worker, length - len(of_rank) if has_last_batch else 0


class EveryRowOnce(GuardedDataset):
    """A GuardedDataset that gives all ranks together every row of an epoch once, and blank rows behind them.

    The same rows in the same order each time: shuffling and sampling are those of epoch 0. Canonical nodes and the
    batching method have no effect.
    """

    _blanks = 0

    @abstractmethod
    def blank_row(self) -> Any:
        """A row as `get_item` gives it, marked so that nothing in it counts."""

    def __iter__(self) -> Iterator[Any]:
        """This worker's rows, all of them or an exception; then its blank ones."""
        yield from super().__iter__()
        for _ in range(self._blanks):
            yield self.blank_row()

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        units, rows = self.resample_streams(0)
        if self.shuffle:
            settings = (self.num_canonical_nodes, self.shuffle_seed, 0, self.shuffle_block_size)
            rows = rows[get_shuffle(self.shuffle_algo, units, *settings)]
        world = self._parallel_worker_world
        mine, self._blanks = share(
            len(rows),
            batch_size=self.batch_size,
            rank=world.rank,
            ranks=world.num_ranks,
            worker=world.worker_of_rank,
            workers=world.workers_per_rank,
        )
        self._promised = len(mine)
        work: NDArray[np.int64] = rows[mine]
        return work
