"""A full checkpoint that lies in memory: how weights of a running training get to the process that exports them.

The file is what ``torch.save`` would write, but its tensors are mapped and filled one at a time, so that the weights
are in memory once. Where the system has anonymous files (Linux: ``memfd_create``) it is one of those: no disk is
written, `/dev/shm` is not needed, and the memory is free again when the last process has closed it, however that ended.
"""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmtrain.checkpoint import manifest

FULL = "full.pt"


class Snapshot:
    """A folder with `full.pt`, to be filled; :func:`seal` makes it a checkpoint.

    Args:
        folder: Made here; named as checkpoints are (`ep0-ba10`), in a folder `checkpoints`.
        tensors: Name -> shape and dtype, by the names of the trainer's model (`model.transformer.wte.weight`).
    """

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]):
        folder.mkdir(parents=True)
        self.folder = folder
        self._descriptor: int | None = None
        file = folder / FULL
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("llmtrain-export")
            # The same number in the process that inherits it.
            file.symlink_to(f"/proc/self/fd/{self._descriptor}")
        # Memory that `empty` gives is not there before it is touched, and `skip_data` touches nothing.
        state: dict[str, Any] = {
            "state": {"model": {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}}
        }
        with file.open("wb") as stream, torch.serialization.skip_data():
            torch.save(state, stream)
        del state
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        self.tensors: dict[str, Tensor] = content["state"]["model"]
        """What to fill, in place."""

    @property
    def inherited(self) -> tuple[int, ...]:
        """File descriptors that a process needs to read it (`pass_fds`)."""
        return () if self._descriptor is None else (self._descriptor,)

    def close(self) -> None:
        """Lets go of the memory; a process that has it open keeps it."""
        self.tensors = {}
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def seal(
    folder: Path, *, step: int, tokens: int, recipe: Mapping[str, Any], tokenizer_fingerprint: str | None = None
) -> None:
    """Write the manifest of a filled snapshot: reads and hashes the file, so not in the training's process.

    Args:
        folder: The snapshot's.
        step: Finished optimizer steps.
        tokens: Tokens trained on.
        recipe: The resolved recipe.
        tokenizer_fingerprint: Of the run's tokenizer.
    """
    manifest.write(
        folder,
        kind="full",
        step=step,
        tokens=tokens,
        files={FULL: manifest.file_entry(folder / FULL)},
        recipe=recipe,
        tokenizer_fingerprint=tokenizer_fingerprint,
        weights_only=True,
    )
