"""Rows of token ids to MDS shards, the format that Streaming's `MDSReader` reads, without importing Streaming.

A shard is: number of samples (uint32), their offsets (uint32, one more than samples), a JSON header, the samples.
With a column of static shape (`ndarray:uint16:2048`) a sample is its values alone, so a shard's body is one array.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from llmtrain.errors import UserError

COLUMN = "tokens"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds all ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Writes rows of one length to `folder/shard.00000.mds[.zstd]`, ...; `index.json` appears in `finish`, atomically.

    Without `finish` (an exception in the `with` block) there is no index, and so nothing that looks like a dataset.

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
        self.folder = folder
        self.samples = 0
        self.bytes_written = 0
        self._dtype = dtype
        self._hashes = list(hashes)
        self._compression = compression
        self._about = about
        row_bytes = seq_len * dtype.itemsize
        self._settings: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": self._hashes,
            "size_limit": size_limit,
            "column_names": [COLUMN],
            "column_encodings": [f"ndarray:{dtype.name}:{seq_len}"],
            "column_sizes": [row_bytes],
        }
        self._header = json.dumps(self._settings, sort_keys=True).encode()
        self._row_bytes = row_bytes
        self._rows_per_shard = (size_limit - 8 - len(self._header)) // (row_bytes + 4)
        if self._rows_per_shard < 1:
            raise UserError(f"size_limit: {size_limit} bytes do not hold one row of {seq_len} tokens")
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0
        self._shards: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

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

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self._n_waiting:
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
        n = self._n_waiting
        first = 8 + 4 * n + len(self._header)
        offsets = first + self._row_bytes * np.arange(n + 1, dtype=np.uint32)
        little = self._dtype.newbyteorder("<")
        body = [np.ascontiguousarray(rows, dtype=little).tobytes() for rows in self._waiting]
        raw = b"".join([np.uint32(n).tobytes(), offsets.astype("<u4").tobytes(), self._header, *body])
        self._waiting.clear()
        self._n_waiting = 0
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


def _hash(name: str) -> Callable[[bytes], str]:
    function = getattr(xxhash, name) if name.startswith("xxh") else getattr(hashlib, name)
    return lambda data: str(function(data).hexdigest())
