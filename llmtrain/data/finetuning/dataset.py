"""The rows of one rank, epoch by epoch, and where a checkpoint stands among them."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from llmtrain.data.finetuning.collate import NumberedRow, TokensAndMask
from llmtrain.data.finetuning.epoch import EpochOrder, EpochPlan
from llmtrain.data.finetuning.store import ExampleStore
from llmtrain.errors import UserError

log = logging.getLogger(__name__)


class FinetuningDataset(Dataset[NumberedRow]):
    """Rows of tokenized examples.

    The rows of an epoch stand in one order. Of a global batch, rank r takes the rows r, r + ranks, ...; so the global
    batches are the same on any number of ranks, and a resume goes on at the row where the checkpoint stood. Where the
    last batch is short, blank rows make the ranks equal (one a rank at most).

    Args:
        stores: of all sources.
        order: makes the rows of an epoch.
        seed: decides the order; a checkpoint's holds.
        device_batch_size: rows of a batch of one rank.
        rank: of this process.
        ranks: number of them.
        drop_last: leave out the rows behind the last full global batch.
        same_epoch: give epoch 0 each time (evaluation).

    Attributes:
        epoch: that is being read, or will be.
        row: of all ranks' rows in it, those that were read before the iteration began: 0 but after a resume.
    """

    def __init__(
        self,
        stores: Sequence[ExampleStore],
        order: EpochOrder,
        *,
        seed: int,
        device_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        drop_last: bool = True,
        same_epoch: bool = False,
    ) -> None:
        self.stores = list(stores)
        self.order = order
        self.seed = seed
        self.device_batch_size = device_batch_size
        self.rank = rank
        self.ranks = ranks
        self.drop_last = drop_last
        self.same_epoch = same_epoch
        self.epoch = 0
        self.row = 0
        self._next = (0, 0)
        self._first = np.concatenate([[0], np.cumsum([len(store) for store in stores])])
        self._planned: tuple[tuple[int, int], EpochPlan] | None = None
        self._most_rows: int | None = None
        self._most_rows = self._capacity()

    def __len__(self) -> int:
        """Rows of an epoch, of all ranks."""
        return self.batches * self.global_batch_size if self.drop_last else self._most_rows or 0

    @property
    def global_batch_size(self) -> int:
        """Rows of a batch of all ranks."""
        return self.device_batch_size * self.ranks

    @property
    def batches(self) -> int:
        """Batches of an epoch, at most."""
        rows, batch = self._most_rows or 0, self.global_batch_size
        return rows // batch if self.drop_last else -(-rows // batch)

    def plan(self, epoch: int) -> EpochPlan:
        """All rows of an epoch, in their order."""
        asked = (0 if self.same_epoch else epoch, self.seed)
        if self._planned is None or self._planned[0] != asked:
            self._planned = asked, self.order.plan(*asked, self._most_rows)
        return self._planned[1]

    def begin_epoch(self) -> None:
        """Turn to the epoch that comes next, or to what a resume left of one."""
        self.epoch, self.row = self._next
        self._next = self.epoch + 1, 0

    def upcoming(self) -> tuple[int, int]:
        """The epoch that the next iteration gives, and the row it begins with."""
        return self._next

    def rows_of_rank(self, epoch: int, row: int) -> list[NDArray[np.int64]]:
        """Numbers of the examples of each row that this rank has from a row of the epoch on; of a blank row none."""
        plan = self.plan(epoch)
        room = self.batches * self.global_batch_size
        if len(plan) > room and not self.drop_last:
            log.warning("epoch %d needs %d rows and has room for %d: the rest is left out", epoch, len(plan), room)
        left = max(min(len(plan), room) - row, 0)
        if self.drop_last:
            left -= left % self.global_batch_size
        mine = [plan.row(number) for number in range(row + self.rank, row + left, self.ranks)]
        blank = -(-left // self.ranks) - len(mine)
        return mine + [np.zeros(0, np.int64)] * blank

    def __getitem__(self, examples: NDArray[np.int64]) -> NumberedRow:
        """The examples of a row: their numbers, and ids and targets of each."""
        numbers = [int(number) for number in examples]
        return numbers, [self.example(number) for number in numbers]

    def example(self, number: int) -> TokensAndMask:
        """An example by its number in all sources: its ids, (n,), and which are targets, (n,)."""
        store, index = self.locate(number)
        return store.ids(index), store.trained(index)

    def place(self, number: int) -> str:
        """Where an example comes from: file and row."""
        store, index = self.locate(number)
        return store.place(index)

    def locate(self, number: int) -> tuple[ExampleStore, int]:
        """The store of an example, and its number there."""
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return self.stores[source], number - int(self._first[source])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a checkpoint stands.

        Args:
            num_samples: rows of all ranks that were read, blank ones included.
            from_beginning: of the epoch; otherwise since the iteration began.
        """
        epoch, row = self.epoch, num_samples + (0 if from_beginning else self.row)
        if from_beginning and num_samples == 0:  # between two epochs: the one that is over must not come again
            epoch, row = self._next
        return {"epoch": epoch, "row_in_epoch": row, "shuffle_seed": self.seed, "examples": self.identity()}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where a checkpoint stood. Its seed holds from now on.

        Raises:
            UserError: it is the state of another kind of loader.
        """
        if "row_in_epoch" not in obj:
            raise UserError(
                "the checkpoint stands in the data of another kind of loader, where this one cannot go on. To start "
                "from its weights, set load_weights_only=true"
            )
        if obj["shuffle_seed"] != self.seed:
            log.warning(
                "shuffle_seed: the recipe says %s, the checkpoint %s; the checkpoint's holds.",
                self.seed,
                obj["shuffle_seed"],
            )
            self.seed = int(obj["shuffle_seed"])
            self._most_rows = None
            self._most_rows = self._capacity()
        if obj.get("examples") != self.identity():
            log.warning(
                "the examples, their mixture or their packing are others than the checkpoint's: of its epoch some may "
                "come twice, or not at all"
            )
        self._next = int(obj["epoch"]), int(obj["row_in_epoch"])
        self.epoch, self.row = self._next

    def identity(self) -> str:
        """Hex: over everything but the seed that decides which examples stand in which row."""
        order = self.order
        parts = [[store.folder.name for store in self.stores], order.draws, order.seq_len, order.window, order.shuffle]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _capacity(self) -> int:
        """Rows that each epoch has room for.

        Composer asks for the length once, and packing needs a row more or fewer from epoch to epoch. The first epoch's
        is the length; where none may be left out there is room for what all examples need when they are packed at once,
        and an epoch that needs more is packed so.
        """
        rows = len(self.plan(0))
        return rows if self.drop_last else max(rows, self.order.fewest_rows(self.seed))


class RowSampler(DistributedSampler[NDArray[np.int64]]):
    """Gives a DataLoader the rows that its rank has left in the epoch that has begun.

    A DistributedSampler by its class alone: that is how Composer sees that ranks read different rows. Composer also
    takes the rows that such a sampler repeats out of an evaluation's last batch, by `total_size`: here there are none.
    """

    dataset: FinetuningDataset

    def __init__(self, dataset: FinetuningDataset) -> None:
        self.dataset = dataset
        self.total_size = len(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the dataset counts its epochs, also through a resume."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self.dataset.rows_of_rank(self.dataset.epoch, self.dataset.row))

    def __len__(self) -> int:
        return len(self.dataset.rows_of_rank(self.dataset.epoch, self.dataset.row))
