"""Rows of token ids, and texts, to MDS shards, the format that Streaming's `MDSReader` reads, without importing it.

A shard is: number of samples (uint32), their offsets (uint32, one more than samples), a JSON header, the samples.
With a column of static shape (`ndarray:uint16:2048`) a sample is its values alone, so a shard's body is one array; with
columns of text (`str`, `json`) it is the size of each value in bytes (uint32) and then the values, columns by name.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from llmtrain.errors import UserError

COLUMN = "tokens"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds all ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class _Shards:
    """The files of one folder: shards as they fill up, and at the end, atomically, `index.json`.

    Without `finish` (an exception in the `with` block) there is no index, and so nothing that looks like a dataset.
    """

    def __init__(
        self,
        folder: Path,
        *,
        columns: Sequence[tuple[str, str, int | None]],
        compression: str | None,
        hashes: Sequence[str],
        size_limit: int,
        about: dict[str, Any] | None,
    ) -> None:
        self.folder = folder
        self.samples = 0
        self.bytes_written = 0
        self._hashes = list(hashes)
        self._compression = compression
        self._about = about
        self._settings: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": self._hashes,
            "size_limit": size_limit,
            "column_names": [name for name, _, _ in columns],
            "column_encodings": [encoding for _, encoding, _ in columns],
            "column_sizes": [size for _, _, size in columns],
        }
        self._header = json.dumps(self._settings, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        index: dict[str, Any] = {"version": 2, "shards": self._shards}
        if self._about is not None:
            index["llmtrain"] = self._about
        partial = self.folder / "index.json.tmp"
        partial.write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
        partial.replace(self.folder / "index.json")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def _flush(self) -> None:
        """Write what waits, if anything does."""
        raise NotImplementedError

    def _write_shard(self, sizes: NDArray[np.int64], body: Sequence[bytes]) -> None:
        """One shard of samples of these sizes, (n,), in bytes."""
        n = len(sizes)
        first = 8 + 4 * n + len(self._header)
        offsets = first + np.concatenate([[0], np.cumsum(sizes)])
        raw = b"".join([np.uint32(n).tobytes(), offsets.astype("<u4").tobytes(), self._header, *body])
        name = f"shard.{len(self._shards):05}.mds"
        entry = {**self._settings, "samples": n, "raw_data": self._file_info(name, raw), "zip_data": None}
        data = raw
        if self._compression is not None:
            level = int(self._compression.partition(":")[2] or 3)
            data = zstandard.ZstdCompressor(level=level).compress(raw)
            name += ".zstd"
            entry["zip_data"] = self._file_info(name, data)
        (self.folder / name).write_bytes(data)
        self.bytes_written += len(data)
        self._shards.append(entry)

    def _file_info(self, name: str, data: bytes) -> dict[str, Any]:
        return {"basename": name, "bytes": len(data), "hashes": {algo: _hash(algo)(data) for algo in self._hashes}}


class ShardWriter(_Shards):
    """Writes rows of one length to `folder/shard.00000.mds[.zstd]`, ...; `index.json` appears in `finish`, atomically.

    Args:
        folder: is made; must not hold an index.
        seq_len: tokens in a row.
        dtype: of the ids in the shards, unsigned.
        compression: None, "zstd" or "zstd:LEVEL".
        hashes: names of hashes of `hashlib` or `xxhash`, sorted.
        size_limit: most bytes in an uncompressed shard.
        about: written to the index under the key "llmtrain", which Streaming ignores.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seq_len: int,
        dtype: np.dtype[Any],
        compression: str | None = "zstd:1",
        hashes: Sequence[str] = ("xxh64",),
        size_limit: int = 1 << 26,
        about: dict[str, Any] | None = None,
    ) -> None:
        row_bytes = seq_len * dtype.itemsize
        column = (COLUMN, f"ndarray:{dtype.name}:{seq_len}", row_bytes)
        super().__init__(
            folder, columns=[column], compression=compression, hashes=hashes, size_limit=size_limit, about=about
        )
        self._dtype = dtype
        self._row_bytes = row_bytes
        self._rows_per_shard = (size_limit - 8 - len(self._header)) // (row_bytes + 4)
        if self._rows_per_shard < 1:
            raise UserError(f"size_limit: {size_limit} bytes do not hold one row of {seq_len} tokens")
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows, (n, seq_len), of the writer's dtype. The array is kept until its shard is full."""
        self.samples += len(rows)
        while len(rows):
            part = rows[: self._rows_per_shard - self._n_waiting]
            self._waiting.append(part)
            self._n_waiting += len(part)
            rows = rows[len(part) :]
            if self._n_waiting == self._rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        if self._n_waiting:
            little = self._dtype.newbyteorder("<")
            body = [np.ascontiguousarray(rows, dtype=little).tobytes() for rows in self._waiting]
            self._write_shard(np.full(self._n_waiting, self._row_bytes), body)
            self._waiting.clear()
            self._n_waiting = 0


class TextShardWriter(_Shards):
    """Writes samples of text and JSON columns; for the rest see `ShardWriter`.

    Args:
        columns: name -> `str` or `json`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        columns: Mapping[str, Literal["str", "json"]],
        compression: str | None = "zstd:1",
        hashes: Sequence[str] = ("xxh64",),
        size_limit: int = 1 << 26,
        about: dict[str, Any] | None = None,
    ) -> None:
        self._columns = dict(sorted(columns.items()))  # Streaming's own order
        super().__init__(
            folder,
            columns=[(name, encoding, None) for name, encoding in self._columns.items()],
            compression=compression,
            hashes=hashes,
            size_limit=size_limit,
            about=about,
        )
        self._empty = 8 + len(self._header)
        self._size_limit = size_limit
        self._waiting: list[bytes] = []
        self._bytes_waiting = self._empty

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample: column -> text, or what JSON can hold. One larger than a shard gets a shard of its own."""
        data = [
            json.dumps(sample[name], ensure_ascii=False).encode() if kind == "json" else sample[name].encode()
            for name, kind in self._columns.items()
        ]
        packed = b"".join([np.array([len(part) for part in data], "<u4").tobytes(), *data])
        if self._bytes_waiting + len(packed) + 4 > self._size_limit:
            self._flush()
        self._waiting.append(packed)
        self._bytes_waiting += len(packed) + 4
        self.samples += 1

    def _flush(self) -> None:
        if self._waiting:
            self._write_shard(np.array([len(sample) for sample in self._waiting]), self._waiting)
            self._waiting.clear()
            self._bytes_waiting = self._empty


def _hash(name: str) -> Callable[[bytes], str]:
    function = getattr(xxhash, name) if name.startswith("xxh") else getattr(hashlib, name)
    return lambda data: str(function(data).hexdigest())
