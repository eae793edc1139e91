"""The files of a checkpoint, hashed while they are written: nothing is read again, and errors keep their cause."""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from llmtrain.checkpoint.manifest import FileEntry
from llmtrain.training.agreement import gets_on

FULL = "full.pt"
Entries = dict[str, FileEntry]
written = 0
"""Bytes of checkpoints that this process has written: what goes up is no hang, however slow the disk is."""


def _count(size: int) -> None:
    global written
    written += size
    if threading.current_thread() is threading.main_thread():
        gets_on()


class HashedFile(io.RawIOBase):
    """A file that is written from its beginning to its end.

    Args:
        path: where.

    Attributes:
        error: what the system said when a write failed; torch.save's own message does not say "disk full".
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self._file = path.open("wb")

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(view)
        self._size += len(view)
        _count(len(view))
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self.flush()  # older versions of torch sync without
        return self._file.fileno()

    def close(self) -> None:
        try:
            if not self._file.closed:
                self._file.close()
        finally:
            super().close()

    def entry(self) -> FileEntry:
        """Size and hash of what was written."""
        return FileEntry(size=self._size, xxh128=self._digest.hexdigest())


@contextmanager
def hashed(path: Path, entries: Entries) -> Iterator[HashedFile]:
    """Opens `path` for writing, and puts it into `entries` at the end.

    Raises:
        OSError: what the system said, whatever became of it on its way through torch.
    """
    stream = HashedFile(path)
    try:
        yield stream
        stream.close()
    except Exception as problem:
        with suppress(OSError):  # writes the rest of its buffer, onto a full disk
            stream.close()
        if stream.error is not None and stream.error is not problem:
            raise stream.error from None
        raise
    entries[path.name] = stream.entry()


class HashedFiles(FileSystem):
    """torch's file system for checkpoints; makes no folder whose parent is gone.

    Attributes:
        entries: of the files that were written, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: Entries = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with hashed(Path(path), self.entries) as stream:
            yield stream

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        # A mount that is gone leaves its empty mount point: nothing is to be made there.
        Path(path).mkdir(exist_ok=True)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        Path(path).rename(new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def write_sharded(folder: Path, planner: SavePlanner, group: Any) -> Entries:
    """Writes this rank's part of a checkpoint, synced to disk (a collective call of `group`).

    Args:
        folder: of the checkpoint; its parent is there.
        planner: knows the state.
        group: the ranks that write.

    Returns:
        This rank's files.

    Raises:
        OSError: a rank could not write.
    """
    files = HashedFiles()
    # No reading ahead: that would start a CUDA stream in a thread that has another device than this rank.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.fs = files
    try:
        save({}, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items())
        raise OSError(cause(error) if rank == 0 else f"rank {rank}: {cause(error)}") from None
    return files.entries


def write_full(folder: Path, state: dict[str, Any]) -> Entries:
    """Writes a checkpoint of one file, synced to disk.

    Raises:
        OSError: it cannot be written.
    """
    entries: Entries = {}
    folder.mkdir(exist_ok=True)
    with hashed(folder / FULL, entries) as stream:
        torch.save(state, cast(IO[bytes], stream))
        os.fsync(stream.fileno())
    return entries


def cause(error: BaseException) -> str:
    """What went wrong, in a few words: the system's where it has some."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
