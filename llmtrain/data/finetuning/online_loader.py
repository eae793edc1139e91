"""The loader of `streaming: true`: packs the windows of its rank as they come."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from llmtrain.conversations.messages import BadExample, Chat, Example
from llmtrain.data.finetuning.collate import FinetuningCollator, TokensAndMask
from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.data.finetuning.epoch import random_of
from llmtrain.data.finetuning.local_ranks import Place, from_leader, gather
from llmtrain.data.finetuning.online import Found, StreamedExamples
from llmtrain.data.finetuning.packing import OnlinePacker
from llmtrain.data.finetuning.sources import Source
from llmtrain.data.finetuning.tokenize_many import Tokenizes
from llmtrain.data.worker_signals import OutlivesSigterm
from llmtrain.errors import UserError

log = logging.getLogger(__name__)

_CHECKED = 64
"""Examples whose rendering and masking are compared before training begins."""


class _Windows(DistributedSampler[NDArray[np.int64]]):
    """The windows that a rank has still to read; a DistributedSampler by its class alone, for Composer."""

    dataset: StreamedExamples

    def __init__(self, dataset: StreamedExamples) -> None:
        self.dataset = dataset
        self.total_size = len(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the dataset counts its epochs."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        epoch, windows = self.dataset.epoch, list(self.dataset.todo)
        return (self.dataset.numbers(epoch, window) for window in windows)

    def __len__(self) -> int:
        return len(self.dataset.todo)


class StreamingLoader(OutlivesSigterm, DataLoader[list[Found]]):
    """Batches of `StreamedExamples`. How many an epoch has is not known before it is over; none is left out.

    Args:
        dataset: the windows of this rank.
        collate: makes batches of rows.
        cfg: workers and the like; each tokenizes a window at a time.
        device_batch_size: rows of a batch of one rank.
        epoch_batches: batches of an epoch, at most; -1 or None for all. Those before a resume count.
    """

    dataset: StreamedExamples

    def __init__(
        self,
        dataset: StreamedExamples,
        collate: FinetuningCollator,
        cfg: FinetuningLoaderConfig,
        device_batch_size: int,
        epoch_batches: int | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=1,
            sampler=_Windows(dataset),
            collate_fn=_only,
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_factor if cfg.num_workers else None,
            timeout=cfg.timeout if cfg.num_workers else 0,
            generator=torch.Generator(),
        )
        self.collate = collate
        self.device_batch_size = device_batch_size
        self.epoch_batches = None if epoch_batches == -1 else epoch_batches

    def __len__(self) -> int:
        """Unknown: it depends on lengths that nobody has seen.

        Raises:
            TypeError: always.
        """
        raise TypeError("dataset.streaming: true: how many batches an epoch has is not known before it is over")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of the next epoch, or those that a resumed epoch has left (each step is a collective call)."""
        data = self.dataset
        packer = data.begin_epoch()
        held = _Held()
        for number in [*packer.examples(), *(number for row in data.rows for number in row)]:
            held.add(number, data.example(number))  # left over by a resumed run
        windows = super().__iter__() if data.todo else iter(())
        while self.epoch_batches is None or data.batches < self.epoch_batches:
            while len(data.rows) < self.device_batch_size and data.todo:
                data.rows.extend(self._pack(_next(windows), packer, held))
                data.todo.pop(0)
            if not data.todo:
                data.rows.extend(packer.finish())
            if not any(gather(bool(data.rows))):
                break
            rows = data.rows[: self.device_batch_size]
            del data.rows[: self.device_batch_size]
            data.count_batch()
            blank: list[list[int]] = [[]] * (self.device_batch_size - len(rows))
            yield self.collate.numbered([(row, [held.take(number) for number in row]) for row in [*rows, *blank]])
        self._say_dropped()

    def next_batch(self) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The batch that comes next, without taking it: the numbers of the examples of each row, and the batch."""
        data, packer = self.dataset, OnlinePacker(self.dataset.seq_len, self.dataset.window)
        epoch, todo, rows, state = data.upcoming()
        if state:
            packer.load_state_dict(state)
        dropped = data.dropped.copy()
        while len(rows) < self.device_batch_size and todo:
            rows += self._pack(data[data.numbers(epoch, todo.pop(0))], packer, _Held())
        data.dropped = dropped
        rows = (rows if len(rows) >= self.device_batch_size else rows + packer.finish())[: self.device_batch_size]
        return rows, self.collate.numbered([(row, [data.example(number) for number in row]) for row in rows])

    def _pack(self, found: list[Found], packer: OnlinePacker, held: "_Held") -> list[list[int]]:
        good = [(number, example) for number, example in found if not isinstance(example, BadExample)]
        self.dataset.dropped.update(example.reason for _, example in found if isinstance(example, BadExample))
        if found and not good:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.dataset.dropped.items())
            raise UserError(f"a whole window of {len(found)} rows has nothing to train on: {reasons}")
        for number, example in good:
            held.add(number, example)
        if not self.dataset.packs:
            return [[number] for number, _ in good]
        rows = packer.add((len(ids) for _, (ids, _) in good), (number for number, _ in good))
        return [rows[n] for n in random_of(self.dataset.seed, len(rows), good[0][0]).permutation(len(rows))]

    def _say_dropped(self) -> None:
        dropped = self.dataset.dropped
        if dropped:
            log.warning("epoch %d: dropped: %s", self.dataset.epoch, dict(dropped))
            dropped.clear()


class _Held:
    """Examples that were read and stand in no batch yet; the same one may be there several times."""

    def __init__(self) -> None:
        self._examples: dict[int, list[TokensAndMask]] = {}

    def add(self, number: int, example: TokensAndMask) -> None:
        self._examples.setdefault(number, []).append(example)

    def take(self, number: int) -> TokensAndMask:
        example = self._examples[number].pop()
        if not self._examples[number]:
            del self._examples[number]
        return example


def build_streaming_loader(
    open_sources: Callable[[], list[Source]],
    tokenize: Tokenizes,
    collate: FinetuningCollator,
    cfg: FinetuningLoaderConfig,
    *,
    vocab_size: int,
    device_batch_size: int,
    evaluation: bool,
    epoch_batches: int | None,
    sequence_parallel_degree: int,
    check: Callable[[Sequence[Example]], Sequence[str]],
) -> StreamingLoader:
    """The loader of `streaming: true`; see `build_finetuning_loader` (a collective call).

    Raises:
        UserError: on all ranks: the shards cannot be read, or a template does not fit them.
    """
    place = Place.detect().in_group(sequence_parallel_degree)

    def make(where: Place) -> StreamedExamples:
        return StreamedExamples(
            open_sources(), tokenize, cfg.dataset, where, vocab_size=vocab_size, same_epoch=evaluation
        )

    def look() -> None:
        """Fetches the index, so that the other ranks find it; and looks at the first examples."""
        data = make(Place(0, 1, 0))
        first = [data.read(int(number))[1] for number in data.numbers(0, 0)[:_CHECKED]]
        for warning in check([example for example in first if isinstance(example, Chat)]):
            log.warning("%s", warning)

    from_leader(look)
    return StreamingLoader(make(place), collate, cfg, device_batch_size, epoch_batches)


def _next(windows: Iterator[list[Found]]) -> list[Found]:
    try:
        return next(windows)
    except UserError as problem:
        if hasattr(windows, "_shutdown_workers"):
            windows._shutdown_workers()  # the garbage collector would wait for them, seconds later
        # From a worker it comes with the worker's traceback in its message.
        kind = type(problem)
        message = str(problem).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
        raise kind(message) from problem


def _only(items: list[list[Found]]) -> list[Found]:
    return items[0]
