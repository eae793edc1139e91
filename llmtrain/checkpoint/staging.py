"""A folder or file that is complete or not there: made under a hidden name beside its place, and renamed."""

import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from llmtrain.errors import UserError


def refuse_place(target: Path) -> None:
    """What is made for a folder is renamed to it, which some places do not allow: better said before the work.

    Raises:
        UserError: it is the folder that we are in (or a parent of it), or a mount point.
    """
    if not target.is_dir():
        return
    if Path.cwd().is_relative_to(target.resolve()):
        raise UserError(f"{target}: is the folder that you are in, or above it; give one below it.")
    if target.is_mount():
        raise UserError(
            f"{target}: is a mount point, which cannot be replaced; give a folder in it: {target / 'export'}"
        )


@contextmanager
def staging(target: Path, doing: str, size: int = 0) -> Iterator[Path]:
    """A hidden folder beside the target, gone at the end whatever happens.

    Args:
        target: Where the work shall appear.
        doing: A word for the folder's name, such as ``exporting``.
        size: Bytes that will be written, as far as that is known.

    Raises:
        UserError: the disk has less room than that, or it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    if free < size:
        raise UserError(f"{target}: needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there.")
    folder = target.parent / f".{target.name}.{doing}-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        with _ended_like_an_exception():
            yield folder
    except OSError as error:
        if _elsewhere(error, folder):
            raise UserError(f"{target}: not made: {error}") from error
        free = shutil.disk_usage(target.parent).free
        raise UserError(f"{target}: cannot be written: {error} ({free / 1e9:.2f} GB free there)") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_like_an_exception() -> Iterator[None]:
    """SIGTERM, of a scheduler above all, ends the block as Ctrl-C does: no gigabytes of half a model are left."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _elsewhere(error: OSError, folder: Path) -> bool:
    """Whether an error is about a file that is somewhere else, such as a cache."""
    return isinstance(error.filename, str) and not Path(error.filename).absolute().is_relative_to(
        folder.parent.absolute()
    )


def move_into_place(made: Path, target: Path, old: Path) -> None:
    """Rename what was made to its place.

    Args:
        made: Complete.
        target: Its place; what is there is replaced.
        old: Where that goes, to be deleted.
    """
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except BaseException:  # SIGTERM and Ctrl-C, too: what was there must not go with the hidden folder
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
