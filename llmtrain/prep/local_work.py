"""Unfinished output on a file system: a hidden folder beside the output, which takes its place when it is complete."""

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.prep.disk import disk_problems
from llmtrain.prep.work import OUTPUT, PLAN

log = logging.getLogger(__name__)

_WORKING = ".work"
_LOCKS, _TEMPORARY = "locks", "tmp"
_SECONDS_BETWEEN_TRIES = 0.1
_PATIENCE = 2.0
"""Seconds. Who gives a shared lock up has it alone for a moment, and must not turn away who comes just then."""
_TRIES = 1000
"""In a row, to make a file with its folders while others remove them; more is no coincidence."""


class LocalWork:
    """`Work` in `.NAME.partial` beside the output NAME; see there for the methods.

    Working files lie in `.work` of it, and go when it has become the output. A file is written under another name,
    flushed to the disk, and renamed, and so is the folder itself: a power failure loses work, and never leaves half a
    file. Locks are `flock` on files in `.work/locks`: the system lets them go when their process ends, however it ends.
    """

    def __init__(self, out: Path) -> None:
        self._out = out.absolute()
        self._folder = self._out.parent / f".{self._out.name}.partial"
        self._old = self._out.parent / f".{self._out.name}.old"
        self._working = self._folder / _WORKING

    def read(self, name: str) -> bytes | None:  # noqa: D102
        return _read(self._working / name)

    def write(self, name: str, data: bytes) -> None:  # noqa: D102
        with disk_problems(self._out.parent):
            self._write(self._working / name, data)

    def names(self, folder: str) -> set[str]:  # noqa: D102
        try:
            with os.scandir(self._working / folder) as entries:  # says what is a file without asking for each
                return {entry.name for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return set()

    def local(self, folder: str) -> Path:  # noqa: D102
        return self._folder / folder

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:  # noqa: D102
        with disk_problems(self._out.parent):
            folder = self._temporaries()
            mine = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
            try:
                yield mine
            finally:
                shutil.rmtree(mine, ignore_errors=True)

    def commit(self, files: Mapping[str, Path], marker: str, content: bytes) -> None:  # noqa: D102
        with disk_problems(self._out.parent):
            targets = {self._folder / place: path for place, path in files.items()}
            for path in targets.values():
                _flush(path)
            for target, path in targets.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            for folder in {target.parent for target in targets}:
                _flush_folders(folder, self._folder)
            self._write(self._working / marker, content)

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:  # noqa: D102
        path = self._working / _LOCKS / name
        with disk_problems(self._out.parent):
            file = self._locked(path, shared, wait)
        with file:
            self._remove_stale()
            try:
                yield
            finally:
                self._remove_stale()
                alone = name == OUTPUT and _is_at(file, path) and (not shared or _has_become_exclusive(file))
                if alone and {path.name for path in self._working.iterdir()} <= {_LOCKS, _TEMPORARY}:
                    shutil.rmtree(self._folder, ignore_errors=True)  # nothing in it: leave no trace

    def published(self, name: str) -> bytes | None:  # noqa: D102
        return _read(self._out / name)

    def occupied(self) -> bool:  # noqa: D102
        return self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir()))

    def publish(self, files: Mapping[str, bytes]) -> None:  # noqa: D102
        with disk_problems(self._out.parent):
            for name, data in files.items():
                self._write(self._folder / name, data)
            if self._out.exists():
                self._set_aside()
            self._folder.rename(self._out)
            _flush(self._out.parent)
        self.repair()

    def amend(self, files: Mapping[str, bytes]) -> None:  # noqa: D102
        with disk_problems(self._out.parent):
            for name, data in files.items():
                _write_to(self._out / name, data, self._out / f".{_prefix()}{name}")
            _flush(self._out)

    def repair(self) -> None:  # noqa: D102
        if self._old.exists() and not self._out.exists():
            self._old.rename(self._out)
        if (self._out / MANIFEST).is_file():
            shutil.rmtree(self._out / _WORKING, ignore_errors=True)
            shutil.rmtree(self._old, ignore_errors=True)

    def is_clean(self) -> bool:  # noqa: D102
        return not self._old.exists() and not (self._out / _WORKING).exists()

    def discard(self) -> None:  # noqa: D102
        with disk_problems(self._out.parent):
            # The plan first: without it the rest is nothing, whenever this is interrupted.
            (self._working / PLAN).unlink(missing_ok=True)
            for path in (*self._folder.glob("*"), *self._working.glob("*")):
                if path.name not in {_WORKING, _LOCKS}:
                    _delete(path)  # all of it, or an error: what stays would be taken for finished work

    def _set_aside(self) -> None:
        if self.occupied() and not (self._out / MANIFEST).is_file():
            raise UserError(
                f"out: {self._out} has come into being meanwhile and was not made by `llmtrain prep`. Move it away and "
                "run the command again"
            )
        shutil.rmtree(self._old, ignore_errors=True)
        self._out.rename(self._old)

    def _remove_stale(self) -> None:
        """Delete what this host's processes that are no more have left."""
        place = _place()
        for path in (self._working / _TEMPORARY).glob(f"{place}.*"):
            pid = path.name.removeprefix(f"{place}.").partition(".")[0]
            if pid.isdecimal() and not _is_running(int(pid)):
                with contextlib.suppress(OSError):
                    _delete(path)

    def _temporaries(self) -> Path:
        folder = self._working / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write(self, path: Path, data: bytes) -> None:
        _write_to(path, data, self._temporaries() / f"{_prefix()}{path.name}")
        _flush_folders(path.parent, self._folder)

    def _locked(self, path: Path, shared: bool, wait: bool) -> IO[str]:
        """The file that holds a lock, open; closing it gives the lock up."""
        patient_until = time.monotonic() + _PATIENCE
        while True:
            file = _opened(path)
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as problem:
                holder = (_read(path) or b"").decode().strip() or "unknown"
                file.close()
                if problem.errno not in {errno.EAGAIN, errno.EACCES}:
                    log.warning("%s: this file system has no locks (%s); start nothing else on it", path, problem)
                    return path.open("a+", encoding="utf-8")
                if not wait and time.monotonic() > patient_until:
                    raise UserError(
                        f"out: another `llmtrain prep` is at work on {self._out} ({holder}). Wait for it, or stop it "
                        "first"
                    ) from problem
                time.sleep(_SECONDS_BETWEEN_TRIES)
                continue
            if _is_at(file, path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
            file.close()  # it went, with the folder that it lay in, before it was locked


def _opened(path: Path) -> IO[str]:
    """A file to append to, made with its folders; those become the output, or go, at any moment."""
    tries = itertools.count(1)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):
            if next(tries) >= _TRIES:
                raise


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_to(path: Path, data: bytes, temporary: Path) -> None:
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.replace(path)


def _prefix() -> str:
    """What the names of this process's temporary files begin with."""
    return f"{_place()}.{os.getpid()}."


def _place() -> str:
    """What process ids belong to: a machine, and on it a namespace: containers may share a machine's name."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"


def _has_become_exclusive(file: IO[str]) -> bool:
    """Whether nobody else holds a lock that was shared."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is the one that lies there now."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folders(folder: Path, top: Path) -> None:
    """The names in a folder, and the folder's own in those above it, up to `top`."""
    while folder.is_relative_to(top):
        _flush(folder)
        folder = folder.parent


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
