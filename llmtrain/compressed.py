"""Files that may be compressed (`.gz`, `.zst`), read to their end or not at all."""

import io
import zlib
from pathlib import Path, PurePath
from typing import IO, Any

import zstandard

_PACKED = 1 << 11  # bytes unpacked at once: text grows to three times that, but a line repeated over and over to 10,000
_CHUNK = 1 << 17


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading; `.gz` and `.zst` are decompressed.

    Raises:
        EOFError: While reading: a compressed file is truncated.
        OSError: It cannot be read, or, while reading, it is damaged.
    """
    return unpacked(path.open("rb"), path.name)


def unpacked(file: IO[bytes], name: str) -> IO[bytes]:
    """What a file holds, decompressed if its name ends in `.gz` or `.zst`; closing that closes the file.

    `zstandard.open` takes the end of a truncated file for the end of the data, as `gzip.open` does with an empty one:
    half a corpus would be missing in silence.

    Raises:
        EOFError: While reading: a compressed file is truncated.
        OSError: While reading: it is damaged.
    """
    if not is_compressed(name):
        return file
    return io.BufferedReader(_Unpacked(file, PurePath(name).suffix), _CHUNK)


def is_compressed(name: str | PurePath) -> bool:
    """Whether a file's name says that it is compressed."""
    return PurePath(name).suffix in {".gz", ".zst"}


def bare_suffix(path: PurePath) -> str:
    """The suffix, that of a compression left out: `.jsonl` of `x.jsonl.gz`."""
    return path.with_suffix("").suffix if is_compressed(path) else path.suffix


class _Unpacked(io.RawIOBase):
    """Members of a gzip file, or frames of a zstd file, one after another."""

    def __init__(self, file: IO[bytes], suffix: str) -> None:
        self._file = file
        self._suffix = suffix
        self._frame: Any = None
        self._packed = memoryview(b"")
        self._plain = memoryview(b"")
        self._seen = False
        self._problem: EOFError | OSError | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; before the end of the file or of what can be read, as far as that goes."""
        filled = 0
        while filled < len(buffer) and self._problem is None:
            try:
                plain = self._next()
            except (EOFError, OSError) as problem:
                self._problem = problem
                break
            if not plain:
                break
            n = min(len(buffer) - filled, len(plain))
            buffer[filled : filled + n], self._plain = plain[:n], plain[n:]
            filled += n
        if self._problem is not None and not filled:  # what stands before the break has been given
            raise self._problem
        return filled

    def _next(self) -> memoryview:
        """What is unpacked and not given yet; nothing at the end."""
        while not self._plain:
            self._packed = self._packed or memoryview(self._file.read(_CHUNK))
            if not self._packed:
                if self._frame is not None or not self._seen:
                    within = "within the compressed data" if self._seen else "before it begins"
                    raise EOFError(f"the file ends {within}: it is truncated")
                break
            if self._frame is None and self._seen and self._suffix == ".gz" and self._packed[0] == 0:
                self._packed = self._packed[1:]  # gzip files may be padded
                continue
            self._unpack()
        return self._plain

    def _unpack(self) -> None:
        self._seen = True
        packed, self._packed = self._packed[:_PACKED], self._packed[_PACKED:]
        try:
            if self._frame is None:
                gz = self._suffix == ".gz"
                self._frame = zlib.decompressobj(wbits=31) if gz else zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(packed))
        except (zlib.error, zstandard.ZstdError) as problem:
            raise OSError(f"the compressed data is damaged: {problem}") from problem
        if self._frame.eof:
            if unused := self._frame.unused_data:
                self._packed = memoryview(unused + self._packed.tobytes())
            self._frame = None
