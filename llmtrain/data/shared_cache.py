"""One cache folder, several runs at once: nobody sees half a file, and nobody deletes what another one counts on."""

import fcntl
import hashlib
import logging
import os
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.file_lock import has_lock

log = logging.getLogger(__name__)

_SLOTS = 16
"""Lock files of a folder; two shards that share one wait for each other now and then."""
_NAP = 0.02
_DYING = 20.0
"""Seconds for which the workers of a killed run may go on reading its cache: they look for their parent every five."""


def default_folder(remote: str) -> str:
    """Where shards of `remote` are cached when nobody says it: in the temporary folder, for this user; made private.

    Raises:
        UserError: the place is another user's.
    """
    mine = Path(tempfile.gettempdir()) / f"llmtrain-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.is_symlink() or mine.stat().st_uid != os.getuid():
        raise UserError(f"{mine} is not this user's: give the stream a local, a folder for its cache")
    return str(mine / "shards" / hashlib.blake2s(remote.encode(), digest_size=16).hexdigest())


@contextmanager
def in_turn(folder: Path, file: str, patience: float) -> Iterator[None]:
    """Keeps other processes of the machine from fetching the same file of a cache.

    Args:
        folder: the cache.
        file: name in it.
        patience: seconds after which the work is done all the same: another process may hang.
    """
    lock = _open(folder / f".lock-{zlib.crc32(file.encode()) % _SLOTS:02}")
    if lock is None:
        yield
        return
    try:
        give_up = time.monotonic() + patience
        while not has_lock(lock, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                log.warning(
                    "%s: another process has been fetching it for %.0f s; fetched twice", folder / file, patience
                )
                break
            time.sleep(_NAP)
        yield
    finally:
        _give_back(lock)


class CacheUse:
    """Says that a run reads a cache, until its dataset goes or the process ends, however it ends.

    With a `cache_limit` a run deletes shards and counts bytes as if it were alone. So it has to be.
    """

    def __init__(self) -> None:
        self._locks: list[int] = []

    def begin(self, folders: Sequence[Path], *, alone: bool) -> str | None:
        """Returns what is in the way, or None; waits while it may be what a killed run left."""
        give_up = time.monotonic() + _DYING
        for folder in folders:
            lock = _open(folder / ".in-use")
            if lock is None:
                continue
            self._locks.append(lock)
            while not has_lock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
                if time.monotonic() < give_up:
                    time.sleep(_NAP)
                    continue
                why = "this one has a cache_limit" if alone else "it has a cache_limit"
                return (
                    f"{folder} is the cache of another run or loader, and {why}, by which it deletes shards. "
                    "Give this one a local of its own"
                )
        return None

    def end_with(self, dataset: Any) -> None:
        """Ends it when `dataset` is collected."""
        weakref.finalize(dataset, self.end, os.getpid())

    def end(self, pid: int) -> None:
        """Gives the locks back, in the process that took them."""
        if os.getpid() == pid:
            while self._locks:
                _give_back(self._locks.pop())


def _open(path: Path) -> int | None:
    """The file, which stays; None where there can be no lock: others that write there have the same trouble."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        pass
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # another user's: enough to lock it
    except OSError:
        return None


def _give_back(file: int) -> None:
    """Unlocks it, also where a process that was forked meanwhile still has it open, and closes it."""
    with suppress(OSError):  # where the file system knows no locks
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
