"""The `finetuning` loader: examples with a mask of what is trained, several to a row if they are packed."""

import logging
from collections.abc import Iterator
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llmtrain.data.finetuning.collate import FinetuningCollator, NumberedRow
from llmtrain.data.finetuning.config import FinetuningDatasetConfig, FinetuningLoaderConfig
from llmtrain.data.finetuning.dataset import FinetuningDataset, RowSampler
from llmtrain.data.finetuning.epoch import EpochOrder, examples_an_epoch
from llmtrain.data.finetuning.local_ranks import Place
from llmtrain.data.finetuning.mask_check import check_template
from llmtrain.data.finetuning.online_loader import StreamingLoader, build_streaming_loader
from llmtrain.data.finetuning.prepare import prepare
from llmtrain.data.finetuning.sources import open_sources
from llmtrain.data.finetuning.store import ExampleStore, default_cache_dir
from llmtrain.data.finetuning.tokenize import ExampleTokenizer
from llmtrain.data.worker_signals import OutlivesSigterm
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


class FinetuningLoader(OutlivesSigterm, DataLoader[NumberedRow]):
    """A DataLoader of a `FinetuningDataset`: each iteration is an epoch, or what a resume left of one.

    Args:
        dataset: the rows of this rank.
        collate: makes batches of rows.
        cfg: workers and the like.
        epoch_batches: batches of an epoch, at most; -1 or None for all. Those before a resume count.
    """

    dataset: FinetuningDataset

    def __init__(
        self,
        dataset: FinetuningDataset,
        collate: FinetuningCollator,
        cfg: FinetuningLoaderConfig,
        *,
        epoch_batches: int | None = None,
    ) -> None:
        workers = cfg.num_workers
        super().__init__(
            dataset,
            batch_size=dataset.device_batch_size,
            sampler=RowSampler(dataset),
            collate_fn=collate.numbered,
            drop_last=False,  # the rows are counted out already, the same for all ranks
            num_workers=workers,
            pin_memory=cfg.pin_memory and torch.cuda.is_available(),
            prefetch_factor=cfg.prefetch_factor if workers else None,
            persistent_workers=cfg.persistent_workers and workers > 0,
            timeout=cfg.timeout if workers else 0,
            # Each new iterator draws a seed for its workers: not from the model's random numbers.
            generator=torch.Generator(),
        )
        self.collate = collate
        self.epoch_batches = epoch_batches

    def __len__(self) -> int:
        """Batches of an epoch, the same for each."""
        return self.dataset.batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of the next epoch, or those that a resumed epoch has left.

        Raises:
            UserError: no batch came within `timeout` seconds.
        """
        self.dataset.begin_epoch()
        left = self._batches_left()
        try:
            for batch in super().__iter__() if left > 0 else ():
                yield batch
                left -= 1
                if left == 0:
                    return
        except RuntimeError as problem:
            if "timed out" not in str(problem):
                raise
            raise UserError(
                f"no batch from the loader's workers within {self.timeout:.0f} s: the disk hangs, or reading takes "
                "longer than that (timeout in the loader's block)"
            ) from problem

    def state_dict(self) -> dict[str, Any]:
        """Where the next iteration begins."""
        return self.dataset.state_dict(0, True)

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self.dataset.load_state_dict(obj)

    def next_batch(self) -> tuple[list[Any], dict[str, Tensor]]:
        """The batch that comes next, without taking it: the numbers of the examples of each row, and the batch."""
        rows = self.dataset.rows_of_rank(*self.dataset.upcoming())[: self.dataset.device_batch_size]
        return rows, self.collate.numbered([self.dataset[row] for row in rows])

    def _batches_left(self) -> int:
        batches = len(self) if self.epoch_batches in (None, -1) else min(self.epoch_batches or 0, len(self))
        return batches - ceil(self.dataset.row / self.dataset.global_batch_size)


def build_finetuning_loader(
    cfg: FinetuningLoaderConfig,
    *,
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    device_batch_size: int,
    evaluation: bool = False,
    epoch_batches: int | None = None,
    sequence_parallel_degree: int = 1,
) -> FinetuningLoader | StreamingLoader:
    """Tokenize the examples, or find those of an earlier run, and make the loader. All ranks call it together.

    The first rank of each machine tokenizes while the others wait.

    Args:
        cfg: the loader's block of the recipe.
        tokenizer: with a chat template, where there are conversations.
        vocab_size: ids of the model.
        device_batch_size: rows in a batch of one device.
        evaluation: all ranks together give each example exactly once, in the same rows each time; `drop_last` then
            leaves out nothing.
        epoch_batches: limit of an epoch, see `FinetuningLoader`.
        sequence_parallel_degree: this many consecutive ranks get the same rows.

    Returns:
        A loader of dicts as `FinetuningCollator.numbered` makes them.

    Raises:
        UserError: on all ranks: the data cannot be read, does not fit, or has nothing to train on.
    """
    data = cfg.dataset
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else default_cache_dir()
    sources = partial(open_sources, data, cache / "shards")
    collate = _collator(data, tokenizer)
    tokenize = ExampleTokenizer(
        tokenizer,
        max_seq_len=data.max_seq_len,
        target_prompts=data.target_prompts,
        target_responses=data.target_responses,
        long_examples=data.long_examples,
    )
    check = partial(check_template, tokenizer)
    if data.streaming:
        return build_streaming_loader(
            sources,
            tokenize,
            collate,
            cfg,
            vocab_size=vocab_size,
            device_batch_size=device_batch_size,
            evaluation=evaluation,
            epoch_batches=epoch_batches,
            sequence_parallel_degree=sequence_parallel_degree,
            check=check,
        )
    stores = prepare(sources, tokenize, cache=cache, vocab_size=vocab_size, strict=data.strict, check=check)
    place = Place.detect().in_group(sequence_parallel_degree)
    dataset = FinetuningDataset(
        stores,
        _order(data, stores),
        seed=data.shuffle_seed,
        device_batch_size=device_batch_size,
        rank=place.rank,
        ranks=place.ranks,
        drop_last=cfg.drop_last and not evaluation,
        same_epoch=evaluation,
    )
    if dataset.batches == 0:
        raise UserError(
            f"the data has {len(dataset.order.lengths):,} examples in {len(dataset.plan(0)):,} rows: not one full "
            f"batch of {dataset.global_batch_size} ({device_batch_size} on each of {place.ranks} ranks). Use a smaller "
            f"batch, more data, {'packing: false, ' if data.packs else ''}or drop_last: false"
        )
    return FinetuningLoader(dataset, collate, cfg, epoch_batches=epoch_batches)


def _order(data: FinetuningDatasetConfig, stores: list[ExampleStore]) -> EpochOrder:
    sizes = [len(store) for store in stores]
    streams = [stream for _, _, stream in data.sources()]
    draws = examples_an_epoch(streams, sizes, data.epoch_size)
    for store, size, draw in zip(stores, sizes, draws, strict=True):
        log.info("%s: %d examples, %d of them an epoch (%.3g times)", store.report.source, size, draw, draw / size)
    return EpochOrder(
        [store.lengths for store in stores],
        draws,
        seq_len=data.max_seq_len,
        window=data.packing_window if data.packs else None,
        shuffle=data.shuffle,
    )


def _collator(data: FinetuningDatasetConfig, tokenizer: "PreTrainedTokenizerFast") -> FinetuningCollator:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return FinetuningCollator(
        data.max_seq_len,
        pad,
        padding_side=tokenizer.padding_side,
        packed=data.packs,
        shorten="longest" if data.pad_to_longest else "multiple of 8" if data.allow_pad_trimming else None,
    )
