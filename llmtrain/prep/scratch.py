"""Temporary folders on this machine that a killed process does not leave for ever."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = "llmtrain-prep-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder below `TMPDIR`, deleted at the end; those of processes that are gone are deleted, too.

    Each has a file beside it that its process holds a lock on: a lock ends with its process, however that ends.
    """
    _sweep()
    while True:
        file, name = tempfile.mkstemp(prefix=_NAME, suffix=".lock")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:  # or another process took it for an old one in between
            break
        os.close(file)
    folder = Path(name).with_suffix("")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
        os.close(file)


def _sweep() -> None:
    for lock in Path(tempfile.gettempdir()).glob(f"{_NAME}*.lock"):
        try:
            file = os.open(lock, os.O_RDWR)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
        except OSError:  # in use
            pass
        finally:
            os.close(file)
