"""Weights of a running training, whole, on rank 0's host: one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.model.config import MPTConfig
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.host_memory import available_memory
from llmtrain.training.language_model import LanguageModel

_RESERVE = 500_000_000
"""Bytes that stay free for the training and for the process that exports."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Gathered:
    """What rank 0 has."""

    snapshot: Snapshot | None = None
    problem: str | None = None
    """Why it is of no use."""

    def close(self) -> None:
        """Lets go of the memory."""
        if self.snapshot is not None:
            self.snapshot.close()


def gather(model: Any, dtype: str, folder: Path | None, problem: str | None = None) -> Gathered:
    """Copies all weights into a snapshot on rank 0 (a collective call).

    Args:
        model: the trainer's, sharded or not.
        dtype: what an MPT's weights are cast to, on the device that they lie on.
        folder: where rank 0 makes the snapshot; None elsewhere.
        problem: why rank 0 cannot make one; then no rank copies anything.

    Returns:
        What rank 0 has; nothing on the other ranks.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    wanted = _final_dtype(model, dtype)
    made = Gathered(problem=problem)

    def allocate() -> str | None:
        if folder is None:
            return made.problem
        shapes = {name: (value.shape, _target_dtype(value, wanted)) for name, value in state.items()}
        need = _needed(state, wanted)
        # Pages come into being when they are filled; too late then for anything but the end of the training.
        if (free := available_memory()) is not None and need > free - _RESERVE:
            less = "Take precision: bfloat16, or give" if wanted == torch.float32 else "Give"
            made.problem = (
                f"an export of the weights takes {need / 1e9:.2f} GB of memory on rank 0, which has "
                f"{free / 1e9:.2f} GB left. {less} the job more memory."
            )
            return made.problem
        try:
            made.snapshot = Snapshot(folder, shapes)
        except (OSError, RuntimeError, MemoryError) as error:
            made.problem = f"there is no memory on rank 0 for a copy of the weights: {error}"
        return made.problem

    if from_rank_zero(allocate) is not None:
        return made
    for name, value in state.items():
        whole = _whole(value, _target_dtype(value, wanted))
        if made.snapshot is None:
            continue
        if made.problem is None and not torch.isfinite(whole).all():
            made.problem = f"`{name}` holds NaN or infinity in {dtype}: " + (
                "it overflows in the cast, or the training broke; take bfloat16 or float32."
                if dtype == "float16"
                else "the training broke."
            )
        made.snapshot.tensors[name].copy_(whole)
    return made


def memory_of_an_export(model: Any, dtype: str) -> int:
    """Bytes that the copy, and the process that reads it, take on rank 0's host (a collective call).

    Args:
        model: the trainer's.
        dtype: as for :func:`gather`.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    return _needed(state, _final_dtype(model, dtype))


def _needed(state: Mapping[str, Any], final: torch.dtype | None) -> int:
    """Bytes of a copy, and of what is read of it at once.

    The proof of an MPT holds its largest tensor twice in float32; other models are opened and merged whole, which takes
    two more of them.
    """
    copy: int = sum(value.numel() * _target_dtype(value, final).itemsize for value in state.values())
    largest: int = max((value.numel() for value in state.values()), default=0)
    return copy + 2 * torch.float32.itemsize * largest if final is not None else 3 * copy


def memory_line(need: int) -> str:
    """What an export takes of rank 0's memory, and whether it is there now.

    Args:
        need: bytes.
    """
    line = f"exports     each takes {need / 1e9:.2f} GB of memory on rank 0"
    free = available_memory()
    if free is None:
        return line
    enough = "" if need <= free - _RESERVE else ". WARNING: not enough; exports will fail, while training goes on"
    return f"{line} ({free / 1e9:.1f} GB are free now){enough}"


def _final_dtype(model: Any, dtype: str) -> torch.dtype | None:
    """What weights are cast to. Adapters are merged before they are cast; only an MPT's weights are final."""
    inner = getattr(model, "module", model)  # within DDP
    is_mpt = isinstance(inner, LanguageModel) and isinstance(inner.config, MPTConfig)
    return DTYPES[dtype] if is_mpt else None


def _target_dtype(value: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and value.is_floating_point() else value.dtype


def _whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One tensor, gathered; cast before on a GPU, where a narrower dtype halves what travels."""
    shards: Any = value.detach()
    if not isinstance(shards, DTensor):
        return value.detach().to(dtype)
    if shards.device.type == "cuda":
        shards = shards.to(dtype)
    whole: Tensor = shards.full_tensor()
    return whole.to(dtype)
