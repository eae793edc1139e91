"""Whether saves have room: memory for a copy of the state on each host, and disk for the checkpoints to come."""

import shutil
from pathlib import Path

from composer import State
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.training.environment import say
from llmtrain.training.host_memory import available_memory
from llmtrain.training.language_model import LanguageModel

_RESERVE = 500_000_000
"""Bytes that stay free for the training itself."""


def room_for_copies(state: State, writes: bool, *, weights_only: bool) -> bool:
    """Whether each host has room for what its ranks copy; says so in one line (a collective call).

    Args:
        state: of the trainer.
        writes: whether this rank does; with hybrid sharding, one replica.
        weights_only: without optimizer state.
    """
    mine = bytes_of_a_copy(state, weights_only=weights_only) if writes else 0
    needs: dict[int, int] = {}
    free: dict[int, int | None] = {}
    for node, need, left in dist.all_gather_object((dist.get_node_rank(), mine, available_memory())):
        needs[node] = needs.get(node, 0) + need
        free[node] = left if node not in free else _least(left, free[node])
    node = min(needs, key=lambda n: (free[n] or 2**62) - needs[n])
    need, left = needs[node], free[node]
    room = left is None or need <= left - _RESERVE
    of = "" if left is None else f" (of {left / 1e9:,.1f} GB that are free)"
    if room:
        say(f"saving      beside the training, from a copy that takes {need / 1e9:,.2f} GB of a host's memory{of}")
    else:
        say(
            f"saving      training waits for each checkpoint: a copy to save from would take {need / 1e9:,.2f} GB of a "
            f"host's memory{of}"
        )
    return room


def bytes_of_a_copy(state: State, *, weights_only: bool = False) -> int:
    """Bytes of this rank's weights and optimizer state, which may not exist before the first step."""
    total = 0
    optimizer = state.optimizers[0] if state.optimizers else None
    moments = _moments(type(optimizer).__name__)
    for parameter in state.model.parameters():
        total += _bytes(parameter)
        if optimizer is not None and parameter.requires_grad and not weights_only:
            held = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
            total += sum(map(_bytes, held)) if held else moments * _bytes(parameter)
    return total


def bytes_of_a_checkpoint(model: LanguageModel, optimizer: str, *, weights_only: bool) -> int:
    """Roughly, of all ranks together: float32 weights, and as much again for each moment of the optimizer."""
    saved: list[int] = [p.numel() for p in model.parameters() if p.requires_grad or not model.should_save_peft_only]
    trained: int = 0 if weights_only else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (sum(saved) + _moments(optimizer) * trained)


def free_space_warning(folder: Path, each: int, keep: int, *, best: bool = False) -> str | None:
    """One line when the disk is too small for the checkpoints to come, else None.

    Args:
        folder: where they go.
        each: bytes of one.
        keep: how many of the newest are kept; -1 for all, of which two are counted.
        best: whether the best one is kept besides.
    """
    there = sum(1 for path in folder.glob("ep*-ba*") if (path / "manifest.json").is_file())
    wanted = (keep if keep > 0 else 2) + int(best)
    # One that is written is there beside all that are kept: the oldest goes when it is complete.
    need = each * (max(0, wanted - there) + 1)
    free = shutil.disk_usage(folder).free
    if free >= need:
        return None
    return (
        f"{folder} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed for the checkpoints that are kept and "
        "one being written. Free some space, or lower save_num_checkpoints_to_keep."
    )


def _moments(optimizer: str) -> int:
    return 1 if "lion" in optimizer.lower() else 2


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return int(local.nbytes)


def _least(one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return min(known) if known else None
