"""safetensors files, tensor by tensor: read by offset, written as a stream.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian, the length of a header; the header, in
JSON: name -> dtype, shape and where the bytes begin and end; the bytes, without gaps. The package itself maps files,
and pages that were looked at count as memory of the process; it writes only what is held as a whole.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.tensor_bytes import read_into, sync, write_from
from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000
"""What the package itself accepts."""
_METADATA = "__metadata__"


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    """Of its first byte in the file."""


class SafetensorsFile(Weights):
    """The tensors of one file.

    Raises:
        UserError: the header does not describe the file: too long, no JSON, an unknown dtype, tensors that overlap,
            leave gaps, or reach beyond the end.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries = _entries(path)
        super().__init__(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        read_into(self._path, entry.offset, tensor)
        return tensor

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._entries[name].dtype


def _entries(path: Path) -> dict[str, _Entry]:
    def damaged(why: str) -> UserError:
        return UserError(f"{path}: cannot be read, the file is damaged ({why}).")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise damaged(f"a header of {length:,} bytes in a file of {size:,}")
            content = parse_json(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise damaged(f"its header is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise damaged("its header is no JSON object")
    content.pop(_METADATA, None)
    places: list[tuple[int, int, str]] = []
    entries = {}
    for name, entry in content.items():
        found = _entry(entry)
        if found is None:
            raise damaged(f"`{name}`: {json.dumps(entry)[:120]}")
        dtype, shape, begin, end = found
        places.append((begin, end, name))
        entries[name] = _Entry(dtype, shape, 8 + length + begin)
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            raise damaged(f"`{name}` begins at byte {begin:,} and the tensors before it end at {reached:,}")
        reached = end
    if reached != size - 8 - length:
        raise damaged(f"its tensors have {reached:,} bytes and the file holds {size - 8 - length:,}")
    return entries


def _entry(entry: Any) -> tuple[torch.dtype, torch.Size, int, int] | None:
    """dtype, shape, begin and end; None where they make no sense."""
    if not isinstance(entry, dict):
        return None
    dtype = DTYPES.get(str(entry.get("dtype")))
    shape, place = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if dtype is None or shape is None or place is None or len(place) != 2:
        return None
    if place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        return None
    return dtype, torch.Size(shape), place[0], place[1]


def _sizes(value: Any) -> list[int] | None:
    fine = isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)
    return value if fine else None


def write_safetensors(
    path: Path, weights: Weights, names: Sequence[str], advance: Callable[[int], None] | None = None
) -> None:
    """Write some of the weights into one file, holding one tensor at a time.

    Args:
        path: The file; its folder is there.
        weights: Where they come from.
        names: Which of them, in this order.
        advance: Told the bytes of each tensor that was written.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}  # transformers wants to know who wrote it
    end = 0
    for name in names:
        begin, end = end, end + weights.size(name)
        shape, dtype = list(weights.shape(name)), _NAMES[weights.dtype(name)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors lie aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = weights[name]
            _promised(weights, name, tensor)
            write_from(file, tensor.contiguous())
            if advance is not None:
                advance(weights.size(name))
        sync(file)


def _promised(weights: Weights, name: str, tensor: Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (weights.shape(name), weights.dtype(name)):
        raise RuntimeError(f"`{name}` is {tensor.dtype} {tuple(tensor.shape)}, not what its header says")
