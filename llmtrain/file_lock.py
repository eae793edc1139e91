"""Locks on files: the system lets them go when their process ends, however it ends."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAP = 0.1


def has_lock(file: int, how: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock of an open file is to be had now; True where the file system knows no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as problem:
        return problem.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextmanager
def one_at_a_time(
    lock: Path, waits: Callable[[], None] = lambda: None, *, nap: float = _NAP, stays: bool = True
) -> Iterator[None]:
    """Keeps other processes from the same work. Where files cannot be locked or made, nobody is kept out.

    Args:
        lock: a file, made for it.
        waits: called once where another process is at work.
        nap: seconds between two looks.
        stays: whether the file stays at the end.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(lock, waits, nap)
    except OSError:  # a folder that cannot be written: whoever has to write there will say so
        yield
        return
    try:
        yield
    finally:
        if not stays:
            with suppress(OSError):
                lock.unlink()
        os.close(file)


def _taken(lock: Path, waits: Callable[[], None], nap: float) -> int:
    told = False
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if has_lock(file) and _is_at(file, lock):
            return file
        os.close(file)  # another's, or one that has gone with the process that had it
        if not told:
            told = True
            waits()
        time.sleep(nap)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
