"""The bytes of a tensor, between memory and a place in a file; nothing is mapped, so nothing stays behind."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmtrain.errors import UserError

_BLOCK = 64 * 1024 * 1024
"""Linux moves at most 2 GiB at once."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_into(path: Path, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous CPU tensor from a file.

    Args:
        path: The file.
        offset: Where its first byte lies.
        tensor: What is filled.

    Raises:
        UserError: the file ends too early, or cannot be read.
    """
    memory = bytes_of(tensor)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < len(memory):
                count = file.readinto(memory[done : done + _BLOCK])
                if not count:
                    raise UserError(
                        f"{path}: ends at byte {offset + done:,}, in the middle of a tensor: it is damaged."
                    )
                done += count
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def write_from(file: BinaryIO, tensor: Tensor) -> None:
    """Append a contiguous CPU tensor's bytes to a file, a part at a time."""
    memory = bytes_of(tensor)
    for start in range(0, len(memory), _BLOCK):
        file.write(memory[start : start + _BLOCK])


def sync(file: BinaryIO) -> None:
    """Have what was written on the disk before anything is renamed."""
    file.flush()
    os.fsync(file.fileno())
