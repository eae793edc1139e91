"""What ``torch.save`` wrote, read tensor by tensor: a ``.pt`` or ``.bin`` file, or a part of a ``.distcp`` file.

Such a file is a zip archive, uncompressed: a pickle that says which tensors there are, and one record of bytes for each
storage. ``torch.load(mmap=True)`` maps the records, and every page that was looked at counts as memory of the process
until the last tensor is gone. Here the pickle is read (with the allow-list of :mod:`llmtrain.checkpoint.unpickle`), the
tensors in it get no memory, and their bytes are read from the file when they are asked for.
"""

import io
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from llmtrain.checkpoint.tensor_bytes import read_into
from llmtrain.checkpoint.unpickle import load_full, load_pickle
from llmtrain.checkpoint.weights import InMemory, Weights
from llmtrain.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, ..., lengths of name and extra field


class UnknownLayoutError(Exception):
    """Not an archive of the kind that current versions of torch write; torch.load itself may know more."""


@dataclass(frozen=True)
class _Record:
    """Where the bytes of one storage lie in the file."""

    offset: int
    size: int


class Archive:
    """One archive of ``torch.save``, laid out but not read.

    Args:
        path: The file.
        start: Where in the file the archive begins.
        length: Its bytes; None for the rest of the file.

    Raises:
        UnknownLayoutError: it is something else, damaged, or names what the allow-list does not know.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None):
        self.path = path
        try:
            with path.open("rb") as file:
                end = file.seek(0, io.SEEK_END)
                window = _Window(file, start, end - start if length is None else min(length, end - start))
                self._open(window, start)
        except Exception as error:  # damaged archives and pickles raise nearly anything
            raise UnknownLayoutError(str(error)) from error

    def _open(self, window: "_Window", start: int) -> None:
        with zipfile.ZipFile(window) as archive:
            pickled = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise UnknownLayoutError("no data.pkl")
            root = pickled[0].removesuffix("data.pkl")
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            order = archive.read(root + "byteorder").decode() if root + "byteorder" in self._entries else "little"
            if order != sys.byteorder:
                raise UnknownLayoutError("bytes in another order")
            self._window, self._start, self._root = window, start, root
            self._records: dict[int, _Record] = {}
            self._storages: dict[str, torch.UntypedStorage] = {}
            content = archive.read(pickled[0])
            self.content: Any = load_pickle(io.BytesIO(content), self._storage)
        del self._window

    def _storage(self, identity: tuple[Any, ...]) -> Any:
        """A storage without memory in the place of one in the file."""
        _, kind, key, _, numel = identity
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        size = int(numel) * dtype.itemsize
        storage = self._storages.get(str(key))
        if storage is None or storage.nbytes() != size:
            entry = self._entries[f"{self._root}data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
                raise UnknownLayoutError(f"record {key} has another size")
            self._window.seek(entry.header_offset)
            magic, name, extra = _LOCAL_HEADER.unpack(self._window.read(_LOCAL_HEADER.size))
            offset = entry.header_offset + _LOCAL_HEADER.size + name + extra
            if magic != b"PK\x03\x04" or offset + size > self._window.length:
                raise UnknownLayoutError(f"record {key} is not where the archive says")
            storage = torch.empty(size, dtype=torch.uint8, device="meta").untyped_storage()
            self._storages[str(key)] = storage  # kept alive, so that its identity stays its own
            self._records[storage._cdata] = _Record(self._start + offset, size)
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=storage, dtype=dtype, _internal=True)

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """What tells whether two tensors of :attr:`content` share their bytes: where the storage lies, and its part."""
        return self._record(tensor).offset, int(tensor.storage_offset()) * tensor.dtype.itemsize

    def read(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """The values of a tensor of :attr:`content`.

        Args:
            tensor: One of those, which have no memory.
            into: A contiguous tensor of its shape and dtype to fill, instead of a new one.

        Raises:
            UserError: the file ends too early, or the tensor is not within its storage.
        """
        record = self._record(tensor)
        first = int(tensor.storage_offset())
        last = first + sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() and (last + 1) * tensor.dtype.itemsize > record.size:
            raise UserError(f"{self.path}: a tensor reaches beyond its bytes: the file is damaged.")
        offset = record.offset + first * tensor.dtype.itemsize
        if tensor.is_contiguous():
            out = torch.empty(tensor.shape, dtype=tensor.dtype) if into is None else into
            read_into(self.path, offset, out)
            return out
        span = torch.empty(last + 1 - first if tensor.numel() else 0, dtype=tensor.dtype)
        read_into(self.path, offset, span)
        found = span.as_strided(tensor.shape, tensor.stride())
        return found.contiguous() if into is None else into.copy_(found)

    def _record(self, tensor: Tensor) -> _Record:
        return self._records[tensor.untyped_storage()._cdata]


class TorchFileTensors(Weights):
    """The tensors of a dict in an archive, by their keys."""

    def __init__(self, archive: Archive, tensors: Mapping[str, Tensor]):
        self._archive = archive
        self._tensors = dict(tensors)
        super().__init__(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._archive.read(self._tensors[name])

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; reads nothing."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor; reads nothing."""
        return self._tensors[name].dtype

    def same_place(self, one: str, other: str) -> bool:
        """Whether both are views of the same bytes, as a tied head is."""
        a, b = self._tensors[one], self._tensors[other]
        alike = (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        return alike and self._archive.place(a) == self._archive.place(b)


def open_torch_file(path: Path, *within: tuple[str, ...]) -> Weights | None:
    """The tensors of a file of ``torch.save``: a state dict, or one inside of nested dicts.

    Args:
        path: The file. One in the format before torch 1.6 is read whole.
        within: Keys that may lead to the state dict, such as ``("state", "model")``; the first that do so count.

    Returns:
        The tensors, or None where no keys lead to a dict of tensors.

    Raises:
        UserError: damaged, or it names what does not belong into a file of tensors.
    """
    archive: Archive | None = None
    try:
        archive = Archive(path)
        content = archive.content
    except UnknownLayoutError:
        content = load_full(path)  # it knows older formats, and says what is wrong
    for keys in within or ((),):
        found = content
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            tensors = {str(name): value for name, value in found.items()}
            return InMemory(tensors) if archive is None else TorchFileTensors(archive, tensors)
    return None


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self.length = file, start, max(0, length)
        self._position = 0

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """As a file's."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        left = max(0, self.length - self._position)
        self._file.seek(self._start + self._position)
        found = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(found)
        return found
