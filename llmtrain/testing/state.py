"""Two checkpoints, compared bit by bit."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded checkpoint, weights and optimizer state, whole and on the CPU."""
    reader = FileSystemReader(checkpoint)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(dict(state), storage_reader=reader, no_dist=True)
    return state


def same_state(left: Path, right: Path) -> int:
    """Compares two sharded checkpoints.

    Returns:
        The number of tensors compared.

    Raises:
        AssertionError: names the first tensor that differs, or the keys that only one of them has.
    """
    a, b = read_state(left), read_state(right)
    if a.keys() != b.keys():
        raise AssertionError(f"only one of the checkpoints has {sorted(a.keys() ^ b.keys())[:5]}")
    for key in a:
        if not torch.equal(a[key], b[key]):
            worst = (a[key].double() - b[key].double()).abs().max().item()
            raise AssertionError(f"{key} differs by up to {worst:.3g}")
    return len(a)
