"""Sequences that grow in the first part of a run (Li et al. 2021, arXiv:2108.06084): `algorithms.seq_length_warmup`.

Composer's algorithm of that name takes models of its own HuggingFaceModel class only; it runs a forward and a backward
on the first batch of each start, which draws random numbers, so that a resume differs; it cannot count the run in
tokens; it changes a batch after it was counted; and it leaves out what does not fill a last piece. Here the data is
changed before anything looks at it, and the length follows from the run's time alone.
"""

from typing import Any

import torch
from composer import Callback, Logger, State, TimeUnit
from composer.core import DataSpec
from composer.core.data_spec import default_split_batch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.data.batch import IGNORE, SAMPLE_ID, tokens_in_batch
from llmtrain.model.documents import PADDING
from llmtrain.training.algorithms import SeqLengthWarmupConfig

Batch = dict[str, Tensor]

_FILL = {"labels": IGNORE, "sequence_id": PADDING}
"""What pads a last piece that is not full; 0 in all others."""


def length_at(cfg: SeqLengthWarmupConfig, progress: float, longest: int) -> int:
    """Tokens of a sequence when `progress` (0 to 1) of the run is done: equal steps, all of them within `duration`."""
    steps = -(-(longest - cfg.min_seq_length) // cfg.step_size)
    done = steps if progress >= cfg.duration else int(steps * progress / cfg.duration)
    return min(cfg.min_seq_length + done * cfg.step_size, longest)


def truncated(batch: Batch, length: int, *, keep_last: bool = False) -> Batch:
    """The first `length` tokens of each row; with `keep_last` the row's last real token takes the last place."""
    changed = {name: x[:, :length].clone() if _by_token(name, x) else x for name, x in batch.items()}
    if keep_last:
        shape = batch["input_ids"].shape
        mask = batch.get("attention_mask", torch.ones(shape, dtype=torch.int64))
        index = torch.arange(shape[1]).expand(shape)
        last = index.masked_fill(~mask.bool(), 0).amax(dim=1)
        rows = torch.arange(shape[0])
        for name, x in batch.items():
            if _by_token(name, x):
                changed[name][rows, last.clamp(max=length - 1)] = x[rows, last]
    return changed


def _by_token(name: str, x: Tensor) -> bool:
    """Whether a part of a batch has a value for each token; `sample_id` may have one for each example of a row."""
    return x.ndim > 1 and name != SAMPLE_ID


def cut(batch: Batch, length: int) -> tuple[Batch, int]:
    """Each row as pieces of `length` tokens, the last one padded, and their number. No token is lost."""
    pieces = -(-batch["input_ids"].shape[1] // length)

    def of(name: str, x: Tensor) -> Tensor:
        if not _by_token(name, x):
            return x.repeat_interleave(pieces, dim=0)
        missing = pieces * length - x.shape[1]
        return F.pad(x, (0, missing), value=_FILL.get(name, 0)).reshape(-1, length)

    if pieces * length > batch["input_ids"].shape[1] and "attention_mask" not in batch:
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}  # padding is not counted
    return {name: of(name, x) for name, x in batch.items()}, pieces


class LengthWarmup(Callback):  # type: ignore[misc]
    """Shortens the sequences of a training loader while the run is young.

    Where rows are cut, a micro-batch has the pieces of as many rows as it would have had: all ranks have equally many
    micro-batches, each with as many tokens as ever. A row counts as one sample, however many pieces it gives.

    Args:
        cfg: the recipe's.
        longest: tokens of a row at the end, the recipe's `max_seq_len`.
    """

    def __init__(self, cfg: SeqLengthWarmupConfig, longest: int) -> None:
        self.cfg = cfg
        self.longest = longest
        self.length = longest
        self._pieces = 1
        self._state: State | None = None

    def data_spec(self, loader: Any) -> DataSpec:
        """The training loader, for Composer."""
        return DataSpec(
            loader,
            batch_transforms=self.shortened,
            split_batch=self._split,
            get_num_samples_in_batch=self._samples,
            get_num_tokens_in_batch=tokens_in_batch,
        )

    def fit_start(self, state: State, logger: Logger) -> None:
        """Learns where to look at the time."""
        self._state = state

    def batch_start(self, state: State, logger: Logger) -> None:
        rows = state.batch["input_ids"].shape[0]
        logger.log_metrics({"seq_length_warmup/curr_seq_len": self.length, "seq_length_warmup/curr_bs": rows})

    def shortened(self, batch: Batch) -> Batch:
        """The batch with sequences as long as they are now."""
        assert self._state is not None
        self.length = length_at(self.cfg, progress(self._state), self.longest)
        self._pieces = 1
        if self.length >= batch["input_ids"].shape[1]:
            return batch
        if self.cfg.truncate:
            return truncated(batch, self.length, keep_last=self.cfg.preserve_end_of_sequence)
        changed, self._pieces = cut(batch, self.length)
        return changed

    def _split(self, batch: Batch, microbatch_size: int | float) -> Any:
        return default_split_batch(batch, int(microbatch_size) * self._pieces)

    def _samples(self, batch: Batch) -> int:
        return int(batch["input_ids"].shape[0]) // self._pieces


def progress(state: State) -> float:
    """Which part of the run is done; by batches where it is given in epochs."""
    end = state.max_duration
    assert end is not None
    if end.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return int(state.timestamp.batch) / max(1, int(state.dataloader_len) * int(end.value))
    return float(state.timestamp.get(end.unit).value) / max(1, int(end.value))
