"""Files of a plan, opened for reading."""

import errno
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from llmtrain.compressed import unpacked
from llmtrain.errors import UserError
from llmtrain.prep.plan import InputFile
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.storage import open_input

# These say something about the file. A disk or a network that fails does not: leaving out what could not be read for
# that reason would make a corpus that is short in another place every time.
_ITS_OWN_FAULT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}


@contextmanager
def opened(file: InputFile) -> Iterator[IO[bytes]]:
    """A file as it lies there.

    Raises:
        UserError: its size, or the time of its last change, is not the one that it was planned with.
        OSError: it cannot be read.
    """
    with open_input(file.path) as data:
        size = data.seek(0, 2)
        if size != file.size:
            raise UserError(
                f"{file.path} has changed since the work was planned: {file.size:,} bytes then, {size:,} now. "
                "Start again from the beginning (--overwrite)"
            )
        now = getattr(getattr(data, "raw", None), "mtime", file.mtime)  # of a remote file, which nobody else looks at
        if now != file.mtime:
            raise UserError(
                f"{file.path} has changed since the work was planned. Start again from the beginning: --overwrite"
            )
        data.seek(0)
        yield data


@contextmanager
def opened_unpacked(file: InputFile) -> Iterator[io.BufferedReader]:
    """What a file holds, decompressed.

    Raises:
        UserError: see `opened`.
        OSError: it cannot be read, or, while reading, it is damaged.
        EOFError: while reading: it is truncated.
    """
    with opened(file) as data, unpacked(data, file.name) as content:
        yield cast("io.BufferedReader", content)


@contextmanager
def noting_damage(path: str, bad: BadInput, reached: Callable[[], str] = str) -> Iterator[None]:
    """The block ends where a file cannot be read any further, and `bad` learns of it.

    Args:
        path: of the file.
        bad: takes note.
        reached: says how far it could be read (`, line 7`).

    Raises:
        UserError: under `on_error: fail`; or the disk or the network failed, not the file.
    """
    try:
        yield
    except (OSError, EOFError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None and problem.errno not in _ITS_OWN_FAULT:
            raise UserError(f"{path} cannot be read: {problem}") from problem
        bad(path, f"cannot be read{reached()}: {problem}")
