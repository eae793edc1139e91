"""What ``torch.load`` opens, written tensor by tensor: ``torch.save`` wants all of them in memory at once.

The archive is that of ``torch.save``: a zip file without compression, a pickle that names tensors and their storages, a
record for each storage, aligned to 64 bytes so that ``mmap=True`` may use them where they lie.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from llmtrain.checkpoint.tensor_bytes import bytes_of, sync
from llmtrain.checkpoint.weights import Weights

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64 = 30, 20  # bytes that zipfile itself writes before a record, besides the name
_PADDING = struct.Struct("<HH")
_PADDING_ID = 0x4246  # torch's own, "FB"
_BLOCK = 16 * 1024 * 1024
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


class _Storage:
    """Stands for the storage of a tensor while the pickle is written."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int):
        self.identity = ("storage", _STORAGES[dtype], key, "cpu", numel)


class _Tensor:
    """Stands for a tensor."""

    def __init__(self, storage: _Storage, shape: torch.Size):
        self.storage, self.shape = storage, tuple(shape)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides, step = [], 1
        for size in reversed(obj.shape):
            strides.append(step)
            step *= max(size, 1)
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, tuple(reversed(strides)), False, hooks)


def write_torch_file(
    path: Path,
    weights: Weights,
    names: Sequence[str],
    wrap: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda tensors: tensors,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write some of the weights into one file, holding one tensor at a time.

    Args:
        path: The file; its folder is there.
        weights: Where they come from: float64, float32, float16 or bfloat16.
        names: Which of them, in this order.
        wrap: Makes what ``torch.load`` shall return from the dict of name -> tensor (nested dicts and plain values).
        advance: Told the bytes of each tensor that was written.
    """
    stand_ins = {
        name: _Tensor(_Storage(str(n), weights.dtype(name), weights.shape(name).numel()), weights.shape(name))
        for n, name in enumerate(names)
    }
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(wrap(dict(stand_ins)))
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _write_record(archive, file, "data.pkl", pickled.getbuffer())
            _write_record(archive, file, "byteorder", memoryview(b"little"))
            for n, name in enumerate(names):
                tensor = weights[name]
                if (tensor.shape, tensor.dtype) != (weights.shape(name), weights.dtype(name)):
                    raise RuntimeError(f"`{name}` is {tensor.dtype} {tuple(tensor.shape)}, not what was announced")
                _write_record(archive, file, f"data/{n}", bytes_of(tensor.contiguous()))
                if advance is not None:
                    advance(weights.size(name))
            _write_record(archive, file, "version", memoryview(b"3\n"))
        sync(file)


def _write_record(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: memoryview) -> None:
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}")  # its date is 1980: the same weights give the same bytes
    entry.file_size = len(content)  # or zipfile would not expect more than 2 GiB
    before = file.tell() + _LOCAL_HEADER + len(entry.filename) + _ZIP64 + _PADDING.size
    padding = -before % _ALIGNMENT
    entry.extra = _PADDING.pack(_PADDING_ID, padding) + b"Z" * padding
    with cast(BinaryIO, archive.open(entry, "w", force_zip64=True)) as record:
        for start in range(0, len(content), _BLOCK):
            record.write(content[start : start + _BLOCK])
