"""A full or unwritable disk, told in words."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


@contextmanager
def disk_problems(folder: Path) -> Iterator[None]:
    """Make a UserError of what the system says about writing below a folder: it is full, or may not be written.

    Errors about files elsewhere pass.
    """
    try:
        yield
    except OSError as problem:
        if problem.filename is not None and not Path(os.fsdecode(problem.filename)).is_relative_to(folder):
            raise
        if problem.errno in _FULL:
            raise UserError(
                f"{folder}: {problem.strerror} ({_free(folder)}). Make room and run the same command again: it goes on "
                "with what is finished"
            ) from problem
        if problem.errno in _FORBIDDEN:
            path = folder if problem.filename is None else os.fsdecode(problem.filename)
            raise UserError(
                f"{path} cannot be written: {problem.strerror}. Mend that, or choose another `out`, and "
                "run the command again"
            ) from problem
        raise


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there"
