"""Rows of token ids, and texts, to MDS shards, the format that Streaming's `MDSReader` reads, without importing it.

A shard is: number of samples (uint32), their offsets (uint32, one more than samples), a JSON header, the samples.
With a column of static shape (`ndarray:uint16:2048`) a sample is its values alone, so a shard's body is one array; with
columns of text (`str`, `json`) it is the size of each value in bytes (uint32) and then the values, columns by name.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from llmtrain.errors import UserError

COLUMN = "tokens"
_CHUNK = 1 << 20  # bytes that are hashed and compressed at once


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds all ids of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class _Shards:
    """The files of one folder: shards as they fill up, and at the end, atomically, `index.json`.

    What waits for its shard to fill lies in a file, so that memory does not grow with the size of a shard. Without
    `finish` (an exception in the `with` block) there is no index, and so nothing that looks like a dataset.
    """

    def __init__(
        self,
        folder: Path,
        *,
        prefix: str,
        columns: Sequence[tuple[str, str, int | None]],
        compression: str | None,
        hashes: Sequence[str],
        size_limit: int,
        about: dict[str, Any] | None,
    ) -> None:
        self.folder = folder
        self.samples = 0
        """Written so far."""
        self.bytes_written = 0
        """Size of the shards' files."""
        self.entries: list[dict[str, Any]] = []
        """What an index says about each shard."""
        self._prefix = prefix
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
        self._body: IO[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Write the last shard, and no index: that of several writers' shards is made of their `entries`."""
        self._flush()

    def finish(self) -> None:
        """Write the last shard and the index."""
        self.close()
        unfinished = self.folder / "index.json.tmp"
        unfinished.write_bytes(index_content(self.entries, self._about))
        unfinished.replace(self.folder / "index.json")

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

    def _keep(self, data: "bytes | memoryview[Any]") -> None:
        """Samples of the next shard."""
        if self._body is None:
            self._body = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  (open until its shard is full)
        self._body.write(data)

    def _write_shard(self, sizes: NDArray[np.int64]) -> None:
        """One shard of the samples that were kept, which have these sizes, (n,), in bytes."""
        assert self._body is not None
        n = len(sizes)
        first = 8 + 4 * n + len(self._header)
        offsets = first + np.concatenate([[0], np.cumsum(sizes)])
        head = b"".join([np.uint32(n).tobytes(), offsets.astype("<u4").tobytes(), self._header])
        name = f"{self._prefix}.{len(self.entries):05}.mds"
        packed = None
        if self._compression is not None:
            level = int(self._compression.partition(":")[2] or 3)
            packed = zstandard.ZstdCompressor(level=level).compressobj(size=int(offsets[-1]))
        raw_hashes, zip_hashes = ({algo: _hash(algo) for algo in self._hashes} for _ in range(2))
        self._body.seek(0)
        with (self.folder / (name if packed is None else f"{name}.zstd")).open("wb") as file:
            for chunk in chain([head], iter(partial(self._body.read, _CHUNK), b"")):
                for hasher in raw_hashes.values():
                    hasher.update(chunk)
                _write(file, chunk if packed is None else packed.compress(chunk), zip_hashes)
            if packed is not None:
                _write(file, packed.flush(), zip_hashes)
            size = file.tell()
        self._body.close()
        self._body = None
        self.bytes_written += size
        entry = {**self._settings, "samples": n, "raw_data": _info(name, int(offsets[-1]), raw_hashes)}
        entry["zip_data"] = None if packed is None else _info(f"{name}.zstd", size, zip_hashes)
        self.entries.append(entry)


def index_content(entries: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None) -> bytes:
    """`index.json` of shards.

    Args:
        entries: of the shards, in their order.
        about: written under the key "llmtrain", which Streaming ignores.
    """
    index: dict[str, Any] = {"version": 2, "shards": list(entries)}
    if about is not None:
        index["llmtrain"] = about
    return json.dumps(index, sort_keys=True).encode()


def _write(file: IO[bytes], data: bytes, hashers: Mapping[str, Any]) -> None:
    file.write(data)
    for hasher in hashers.values():
        hasher.update(data)


def _info(name: str, size: int, hashers: Mapping[str, Any]) -> dict[str, Any]:
    return {"basename": name, "bytes": size, "hashes": {algo: hasher.hexdigest() for algo, hasher in hashers.items()}}


class ShardWriter(_Shards):
    """Writes rows of one length to `folder/PREFIX.00000.mds[.zstd]`, ...; `index.json` appears in `finish`, atomically.

    Args:
        folder: is made; must not hold an index.
        prefix: of the shards' names.
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
        prefix: str = "shard",
        compression: str | None = "zstd:1",
        hashes: Sequence[str] = ("xxh64",),
        size_limit: int = 1 << 26,
        about: dict[str, Any] | None = None,
    ) -> None:
        row_bytes = seq_len * dtype.itemsize
        column = (COLUMN, f"ndarray:{dtype.name}:{seq_len}", row_bytes)
        super().__init__(
            folder,
            prefix=prefix,
            columns=[column],
            compression=compression,
            hashes=hashes,
            size_limit=size_limit,
            about=about,
        )
        self._dtype = dtype
        self._row_bytes = row_bytes
        self._rows_per_shard = (size_limit - 8 - len(self._header)) // (row_bytes + 4)
        if self._rows_per_shard < 1:
            raise UserError(f"size_limit: {size_limit} bytes do not hold one row of {seq_len} tokens")
        self._n_waiting = 0

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows, (n, seq_len), of the writer's dtype."""
        little = self._dtype.newbyteorder("<")
        self.samples += len(rows)
        while len(rows):
            part = rows[: self._rows_per_shard - self._n_waiting]
            self._keep(np.ascontiguousarray(part, dtype=little).data)
            self._n_waiting += len(part)
            rows = rows[len(part) :]
            if self._n_waiting == self._rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        if self._n_waiting:
            self._write_shard(np.full(self._n_waiting, self._row_bytes))
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
            prefix="shard",
            columns=[(name, encoding, None) for name, encoding in self._columns.items()],
            compression=compression,
            hashes=hashes,
            size_limit=size_limit,
            about=about,
        )
        self._empty = 8 + len(self._header)
        self._size_limit = size_limit
        self._sizes: list[int] = []
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
        self._keep(packed)
        self._sizes.append(len(packed))
        self._bytes_waiting += len(packed) + 4
        self.samples += 1

    def _flush(self) -> None:
        if self._sizes:
            self._write_shard(np.array(self._sizes))
            self._sizes.clear()
            self._bytes_waiting = self._empty


def _hash(name: str) -> Any:
    """A running hash: has `update` and `hexdigest`."""
    return getattr(xxhash, name)() if name.startswith("xxh") else hashlib.new(name)
