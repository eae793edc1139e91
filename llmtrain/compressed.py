"""Files that may be compressed (`.gz`, `.zst`), read to their end or not at all."""

import gzip
import io
from pathlib import Path
from typing import IO

import zstandard

_CHUNK = 1 << 17


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading; `.gz` and `.zst` are decompressed.

    Raises:
        EOFError: While reading: a compressed file is truncated.
        OSError: It cannot be read, or, while reading, it is damaged.
    """
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return open_zstd(path) if path.suffix == ".zst" else path.open("rb")


def bare_suffix(path: Path) -> str:
    """The suffix, that of a compression left out: `.jsonl` of `x.jsonl.gz`."""
    return path.with_suffix("").suffix if path.suffix in {".gz", ".zst"} else path.suffix


def open_zstd(path: Path) -> IO[bytes]:
    """Open a zstd file of one or more frames for reading.

    `zstandard.open` takes the end of a truncated file for the end of the data: half a corpus would be missing in
    silence.

    Raises:
        EOFError: While reading: the file ends within a frame.
        OSError: While reading: it is not zstd, or it is damaged.
    """
    return io.BufferedReader(_Frames(path), _CHUNK)


class _Frames(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._plain = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            packed = self._packed or self._file.read(_CHUNK)
            self._packed = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the zstd data ends within a frame: the file is truncated")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = self._frame.decompress(packed)
            except zstandard.ZstdError as problem:
                raise OSError(str(problem)) from problem
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._plain))
        buffer[:n], self._plain = self._plain[:n], self._plain[n:]
        return n
