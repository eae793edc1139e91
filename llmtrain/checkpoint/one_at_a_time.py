"""One process at a time works in a folder, also where several machines share it."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAP = 0.1


@contextmanager
def one_at_a_time(file: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keeps others out until the end, however this process ends.

    Args:
        file: is made for it, and goes at the end. Where the file system knows no locks, nobody is kept out.
        waits: called once where another process is at work.

    Raises:
        OSError: the file cannot be made.
    """
    lock = _taken(file, waits)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(lock)


def _taken(file: Path, waits: Callable[[], None]) -> int:
    told = False
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if _locked(lock) and _is(lock, file):
            return lock
        os.close(lock)  # another's, or one that has gone with the process that had it
        if not told:
            told = True
            waits()
        time.sleep(_NAP)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return problem.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), file.stat())
    except FileNotFoundError:
        return False
