"""A sharded checkpoint of weights, written by torch's own writer, tensor by tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from llmtrain.checkpoint.weights import Weights

PREFIX = "state.model.model."
"""What stands before MPT's names in Composer's sharded checkpoints."""


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


def write_sharded(folder: Path, weights: Weights, advance: Callable[[int], None] | None = None) -> None:
    """Write ``.metadata`` and one ``.distcp`` file, under the names that Composer gives to a model's weights.

    Any number of ranks loads it; each reads whole tensors and keeps its part.

    Args:
        folder: Where to.
        weights: By MPT's names; one is held at a time.
        advance: Told the bytes of each tensor that is written.
    """
    empty: dict[str, Tensor] = {
        f"model.{name}": torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta") for name in weights
    }
    save(
        {"state": {"model": empty}},
        # No thread reads ahead: that would hold more than one tensor.
        storage_writer=FileSystemWriter(folder, single_file_per_rank=True, thread_count=1, per_thread_copy_ahead=0),
        planner=_Streaming(weights, advance),
        no_dist=True,
    )
