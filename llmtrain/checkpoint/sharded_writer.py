"""A sharded checkpoint of weights, written by torch's own writer, tensor by tensor."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError

PREFIX = "state.model.model."
"""What stands before MPT's names in Composer's sharded checkpoints."""
FILE_SIZE = 128_000_000
"""Bytes of tensors in a file; a larger tensor has one of its own."""


class _Streaming(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each when it is written."""

    def __init__(self, weights: Weights, advance: Callable[[int], None] | None):
        super().__init__()
        self._weights, self._advance = weights, advance

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The tensor of an item of the plan."""
        name = write_item.index.fqn.removeprefix(PREFIX)
        tensor = self._weights[name]
        if (tensor.shape, tensor.dtype) != (self._weights.shape(name), self._weights.dtype(name)):
            raise RuntimeError(f"`{name}` is {tensor.dtype} {tuple(tensor.shape)}, not what was announced")
        if self._advance is not None:
            self._advance(self._weights.size(name))
        return tensor


class _Groups(FileSystemWriter):
    """Writes the plan in several files: torch keeps the tensors of a file until it is complete (seen in torch 2.15)."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's items, one file after the other."""
        results: list[WriteResult] = []
        prefix = type(plan.storage_data)  # of the files' names: each group gets that of another rank
        for number, items in enumerate(_groups(plan.items)):
            part = dataclasses.replace(plan, items=items, storage_data=prefix(f"__{number}_"))
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _groups(items: list[WriteItem]) -> list[list[WriteItem]]:
    groups: list[list[WriteItem]] = [[]]
    filled = 0
    for item in items:
        assert item.tensor_data is not None
        size = item.tensor_data.size.numel() * item.tensor_data.properties.dtype.itemsize
        if groups[-1] and filled + size > FILE_SIZE:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def write_sharded(folder: Path, weights: Weights, advance: Callable[[int], None] | None = None) -> None:
    """Write ``.metadata`` and ``.distcp`` files, under the names that Composer gives to a model's weights.

    Any number of ranks loads it; each reads whole tensors and keeps its part.

    Args:
        folder: Where to.
        weights: By MPT's names; a file's worth of them is held at a time.
        advance: Told the bytes of each tensor that is written.

    Raises:
        UserError: the weights cannot be read.
    """
    empty: dict[str, Tensor] = {
        f"model.{name}": torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta") for name in weights
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)  # one process is what is meant
            save(
                {"state": {"model": empty}},
                # No thread reads ahead: that would hold more than one tensor.
                storage_writer=_Groups(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0),
                planner=_Streaming(weights, advance),
                no_dist=True,
            )
    except CheckpointException as failed:
        mistake = next((error for error, _ in failed.failures.values() if isinstance(error, UserError)), None)
        if mistake is None:
            raise
        raise UserError(str(mistake)) from None  # what is wrong with the source, without torch's tracebacks
