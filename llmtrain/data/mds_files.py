"""A folder of MDS shards read for looking at it: index, bytes and rows, without importing Streaming (and so torch)."""

import bz2
import gzip
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator

from llmtrain.data.shards import INDEX, check_names, check_size
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

_VALUE_DTYPES = {
    8: "u1",
    9: "i1",
    16: "<u2",
    17: "<i2",
    32: "<u4",
    33: "<i4",
    64: "<u8",
    65: "<i8",
}  # Streaming's codes


class FileEntry(BaseModel):
    """What the index says about a file."""

    basename: str = Field(min_length=1)
    """Path within the folder."""
    bytes: int = Field(ge=8)
    """Its size."""
    hashes: dict[str, str] = Field(default_factory=dict)
    """Name of the algorithm -> hex digest."""


class ShardEntry(BaseModel):
    """What the index says about a shard."""

    version: Literal[2]
    format: Literal["mds"]
    samples: int = Field(ge=0)
    """Rows."""
    compression: str | None = None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]
    """Bytes of a value, None where they differ from row to row."""
    raw_data: FileEntry
    zip_data: FileEntry | None = None

    @model_validator(mode="after")
    def _columns_agree(self) -> Self:
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes differ in length")
        if self.compression is not None and self.zip_data is None:
            raise ValueError("compressed, but zip_data is missing")
        return self

    @property
    def name(self) -> str:
        """The file as it lies in a finished folder."""
        return (self.zip_data or self.raw_data).basename

    @property
    def size(self) -> int:
        """Its bytes."""
        return (self.zip_data or self.raw_data).bytes


class Index(NamedTuple):
    """An `index.json`."""

    shards: list[ShardEntry]
    about: dict[str, Any]
    """What `llmtrain prep` wrote into it; empty for shards of another origin."""


class Damage(ValueError):
    """A file is not what it should be; the message says what is wrong with it."""


def read_index(folder: Path) -> Index:
    """The index of a folder.

    Raises:
        Damage: it cannot be read, or contradicts itself.
        UserError: it names files outside of the folder.
    """
    try:
        content = parse_json((folder / INDEX).read_bytes())
        entries = content["shards"]
        shards = [ShardEntry.model_validate(entry) for entry in entries]
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"])) or "entry"
        raise Damage(f"{len(entries)} shards, but the {key} of one is no good: {first['msg']}") from problem
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise Damage(f"cannot be read: {type(problem).__name__}: {problem}") from problem
    files = [file.basename for shard in shards for file in (shard.raw_data, shard.zip_data) if file is not None]
    check_names(files, str(folder))
    for shard in shards:
        check_size(shard.raw_data.basename, shard.samples, shard.raw_data.bytes, str(folder))
    twice = sorted(name for name, times in Counter(files).items() if times > 1)
    if twice:
        raise Damage(f"names a file twice: {', '.join(twice[:5])}")
    about = content.get("llmtrain")
    return Index(shards, about if isinstance(about, dict) else {})


def digest(algorithm: str, data: bytes) -> str | None:
    """Hex digest by one of the hashes that Streaming knows, or None for an algorithm that is not on this machine."""
    if algorithm.startswith("xxh"):
        function = getattr(xxhash, algorithm, None)
        return None if function is None else str(function(data).hexdigest())
    if algorithm not in hashlib.algorithms_available or algorithm.startswith("shake"):
        return None
    return hashlib.new(algorithm, data).hexdigest()


def unpack(data: bytes, compression: str, most: int) -> bytes:
    """A shard decompressed, but hardly more than `most` bytes of it: few bytes may unfold to terabytes.

    Raises:
        Damage: it is not what its compression makes.
        UserError: the compression is unknown, or its package is not installed.
    """
    kind = compression.partition(":")[0]
    try:
        if kind == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
                return bytes(reader.read(most + 1))
        if kind == "gz":
            with gzip.open(io.BytesIO(data)) as unzipped:
                return unzipped.read(most + 1)
        if kind == "bz2":
            with bz2.open(io.BytesIO(data)) as unzipped:
                return unzipped.read(most + 1)
        if kind == "br":
            return _unpack_brotli(data, most)
        if kind == "snappy":
            import snappy  # type: ignore[import-untyped]

            if (size := _snappy_size(data)) > most:
                raise ValueError(f"it says that it makes {size:,} bytes, and no more than {most:,} are expected")
            return bytes(snappy.decompress(data))
    except ImportError as problem:
        raise UserError(f"compression {compression!r} needs a package: {problem}") from problem
    except Exception as problem:  # each library raises its own
        raise Damage(f"does not decompress: {problem}") from problem
    raise UserError(f"compression {compression!r} is unknown; known: br, bz2, gz, snappy, zstd")


def _unpack_brotli(data: bytes, most: int) -> bytes:
    import brotli  # type: ignore[import-untyped]

    decoder, parts, size = brotli.Decompressor(), list[bytes](), 0
    try:
        parts.append(decoder.process(data, output_buffer_limit=most + 1))
        while (size := size + len(parts[-1])) <= most and parts[-1] and not decoder.is_finished():
            parts.append(decoder.process(b"", output_buffer_limit=most + 1))
    except TypeError:  # brotli before 1.2 knows no limit: so many bytes unfold to some hundred MB, at worst
        for start in range(0, len(data), 64):
            parts.append(decoder.process(data[start : start + 64]))
            if (size := size + len(parts[-1])) > most:
                break
    if size <= most and not decoder.is_finished():
        raise ValueError("it is cut short")
    return b"".join(parts)


def _snappy_size(data: bytes) -> int:
    """What the first bytes say that comes out; whoever decompresses makes room for it before it looks further."""
    size = 0
    for place, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return size
    raise ValueError("its length is missing")


class Rows:
    """The rows of one shard.

    Args:
        raw: the shard, decompressed.
        entry: what the index says about it.

    Raises:
        Damage: offsets, row count or columns are not what the index says.
    """

    def __init__(self, raw: bytes, entry: ShardEntry) -> None:
        self._raw = raw
        self._entry = entry
        n = int.from_bytes(raw[:4], "little")
        if n != entry.samples:
            raise Damage(f"holds {n:,} rows, the index says {entry.samples:,}")
        body = 4 + 4 * (n + 1)
        if len(raw) < body:
            raise Damage(f"ends within its table of {n:,} rows")
        self._offsets = np.frombuffer(raw, "<u4", n + 1, 4).astype(np.int64)
        if self._offsets[0] < body or self._offsets[-1] != len(raw) or (np.diff(self._offsets) < 0).any():
            raise Damage("its table of rows points outside of it, or backwards")
        self._check_header(raw[body : self._offsets[0]])
        least = sum(4 if size is None else size for size in entry.column_sizes)
        if n and np.diff(self._offsets).min() < least:
            raise Damage(f"has a row of {np.diff(self._offsets).min()} bytes, its columns need {least}")

    def _check_header(self, header: bytes) -> None:
        try:
            said = parse_json(header)
        except ValueError as problem:
            raise Damage(f"its header is no JSON: {problem}") from problem
        for key in ("column_names", "column_encodings", "column_sizes"):
            if said.get(key) != getattr(self._entry, key):
                raise Damage(f"its header says {key} {said.get(key)}, the index {getattr(self._entry, key)}")

    def tokens(self, bytes_dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        """Token ids of the column `tokens`, as blocks of rows, (rows, length).

        Args:
            bytes_dtype: of the ids where the column is plain `bytes`.

        Raises:
            Damage: a row is no array of ids.
        """
        entry = self._entry
        column = entry.column_names.index("tokens")
        encoding = entry.column_encodings[column]
        _, _, detail = encoding.partition(":")
        dtype, _, shape = detail.partition(":")
        if len(entry.column_names) == 1 and shape and "," not in shape and entry.samples:
            body = np.frombuffer(self._raw, np.dtype(dtype).newbyteorder("<"), offset=int(self._offsets[0]))
            if len(body) != entry.samples * int(shape):
                raise Damage(f"holds {len(body):,} ids, the index says {entry.samples:,} rows of {shape}")
            yield body.reshape(entry.samples, int(shape))
            return
        for number in range(entry.samples):
            yield _ids(self.value(number, column), encoding, bytes_dtype)[None]

    def value(self, row: int, column: int) -> bytes:
        """One value as it lies in the shard.

        Raises:
            Damage: its size reaches beyond the row.
        """
        data = memoryview(self._raw)[self._offsets[row] : self._offsets[row + 1]]
        sizes, place = [], 0
        for size in self._entry.column_sizes:
            if size is None:
                sizes.append(int.from_bytes(data[place : place + 4], "little"))
                place += 4
            else:
                sizes.append(size)
        if place + sum(sizes) != len(data):
            raise Damage(f"row {row}: the sizes of its values do not add up")
        start = place + sum(sizes[:column])
        return bytes(data[start : start + sizes[column]])

    def texts(self, row: int) -> dict[str, Any]:
        """The values of a row whose columns are `str` or `json`, by column; others are left out.

        Raises:
            Damage: a value is no UTF-8, or no JSON.
        """
        found = {}
        for column, (name, encoding) in enumerate(
            zip(self._entry.column_names, self._entry.column_encodings, strict=True)
        ):
            if encoding not in {"str", "json"}:
                continue
            try:
                text = self.value(row, column).decode()
                found[name] = parse_json(text) if encoding == "json" else text
            except ValueError as problem:
                if isinstance(problem, Damage):
                    raise
                raise Damage(f"row {row}: column {name!r} is no {encoding}: {problem}") from problem
        return found


def _ids(data: bytes, encoding: str, bytes_dtype: np.dtype[Any]) -> NDArray[Any]:
    """One row's ids, (length,)."""
    kind, _, detail = encoding.partition(":")
    dtype: Any = bytes_dtype
    place = 0
    if kind == "ndarray":
        name, _, shape = detail.partition(":")
        if name:
            dtype = np.dtype(name).newbyteorder("<")
        else:
            dtype = _VALUE_DTYPES.get(data[0])
            place = 1
        if not shape:  # (number of dimensions << 2 | log2 of the bytes of each dimension), the dimensions
            place += 1 + (data[place] >> 2) * (1 << (data[place] & 3))
    elif kind != "bytes":
        raise UserError(f"column 'tokens' is {encoding}; expected an integer ndarray or bytes")
    if dtype is None or (len(data) - place) % np.dtype(dtype).itemsize:
        raise Damage(f"{len(data) - place} bytes are no whole number of ids")
    return np.frombuffer(data, dtype, offset=place)
