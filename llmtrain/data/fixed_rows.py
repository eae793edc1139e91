"""Rows of one length, read from shards that stay open.

Streaming opens a shard's file for each sample, and reads where the sample lies before it reads the sample. Where all
rows of a shard have the same bytes, as those of `llmtrain prep` do, row n lies n rows behind the first.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST = 128
"""Files that are open at a time; a process may have 1024 in all on many systems."""


class _Shard(NamedTuple):
    file: int
    begin: int
    """Offset of the first row."""
    size: int
    """Bytes of a row."""
    dtype: np.dtype[Any]


class FixedRows:
    """The rows of shards by their place, as long as the files are there and as their headers say.

    Args:
        shards: Streaming's readers. Shards with other columns than `tokens`, or without a fixed length, have no rows
            here.
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = shards
        self._others: set[int] = set()  # read by Streaming
        self._files: OrderedDict[int, _Shard] = OrderedDict()
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> Any:
        return FixedRows, (self._shards,)  # files stay where they were opened

    def read(self, shard_id: int, row: int) -> NDArray[Any] | None:
        """One row, (length,) of an unsigned or signed integer type; None when it has to be read in another way."""
        shard = self._files.get(shard_id)
        if shard is None:
            if shard_id in self._others or (shard := self._open(shard_id)) is None:
                return None
        else:
            self._files.move_to_end(shard_id)
        data = _read(shard.file, shard.size, shard.begin + row * shard.size)
        if len(data) < shard.size:  # cut short since it was opened, or on NFS replaced by somebody
            self.forget(shard_id)
            return None
        return np.frombuffer(data, shard.dtype)

    def forget(self, shard_id: int) -> None:
        """Close a shard."""
        if (shard := self._files.pop(shard_id, None)) is not None:
            os.close(shard.file)

    def _open(self, shard_id: int) -> _Shard | None:
        reader = self._shards[shard_id]
        kind, _, detail = reader.column_encodings[0].partition(":")
        dtype, _, length = detail.partition(":")
        if reader.column_names != ["tokens"] or kind != "ndarray" or not length.isdigit():
            self._others.add(shard_id)
            return None
        try:
            file = os.open(Path(reader.dirname, reader.split or "", reader.raw_data.basename), os.O_RDONLY)
        except OSError:  # not fetched yet; whoever fetches it says what is wrong
            return None
        size = int(length) * np.dtype(dtype).itemsize
        header = _read(file, 4 * (reader.samples + 2), 0)
        offsets = np.frombuffer(header[: len(header) // 4 * 4], np.uint32).astype(np.int64)
        if (
            len(offsets) < reader.samples + 2
            or offsets[0] != reader.samples
            or (np.diff(offsets[1:]) != size).any()
            or os.fstat(file).st_size < offsets[-1]
        ):
            os.close(file)
            return None
        if len(self._files) >= _MOST:
            self.forget(next(iter(self._files)))
        shard = self._files[shard_id] = _Shard(file, int(offsets[1]), size, np.dtype(dtype))
        return shard


def _read(file: int, size: int, begin: int) -> bytes:
    """Nothing where it cannot be read: Streaming opens the file anew, or says what is wrong with it."""
    try:
        return os.pread(file, size, begin)
    except OSError:
        return b""


def _close(files: "OrderedDict[int, _Shard]") -> None:
    while files:
        os.close(files.popitem()[1].file)
