"""Names of a dataset's shared memory and locks: no other run has them, and they go when their last owner goes.

Streaming names them by the first number that is free on the machine, `000000_barrier` and so on, and looks for it
without a lock: two runs that start at once find the same one. What a killed run leaves keeps its number for good, and
where it names the same cache folder it stops the next run. The lock files lie in the temporary folder, two more with
each dataset, and none is ever removed.

Here the number is drawn at random, and whoever uses it holds a lock on a file of that number: NUMBER_llmtrain. The
system gives that lock back however a process ends. So the names of a dead run can be told from those of a living one,
also across containers and users, where process ids mean nothing; the next run removes them.
"""

import atexit
import fcntl
import logging
import os
import re
import secrets
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared import array as streaming_array
from streaming.base.shared.prefix import _check_self, _get_path
from streaming.base.world import World
from torch import distributed as dist

if sys.platform != "win32":
    from _posixshmem import shm_unlink  # type: ignore[import-not-found]  # typeshed does not know it

log = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_OWNER = "llmtrain"
_NAMES = re.compile(rf"(\d{{10}})_({'|'.join([_OWNER, BARRIER_FILELOCK, CACHE_FILELOCK, *SHM_TO_CLEAN])})")
_PATIENCE = 10.0
"""Seconds until another rank has given shared memory its size; it does that right after making it."""


def lock_folder() -> Path:
    """Where the locks lie: with the shared memory, where the system has a folder for that.

    Containers often share their temporary folder and not their shared memory, or the other way round. Never in TMPDIR,
    which each run changes.
    """
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path("/tmp")


class Untracked(SharedMemory):  # type: ignore[misc]
    """Shared memory that Python's resource tracker does not know.

    The tracker warns of what a killed process left, and removes it while others may use it. Here the owners' lock says
    when it goes.

    Raises:
        ValueError: another rank has made it, and not given it its size after `_PATIENCE`. Streaming waits for 7 ms.
        OSError: of the system; FileNotFoundError where there is none to open.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        give_up = time.monotonic() + _PATIENCE
        while True:
            register, resource_tracker.register = resource_tracker.register, lambda *_: None
            try:
                super().__init__(*args, **kwargs)
                return
            except ValueError:  # an empty file cannot be mapped
                if time.monotonic() > give_up:
                    raise
            finally:
                resource_tracker.register = register
            time.sleep(0.005)

    def __reduce__(self) -> Any:
        return Untracked, (self.shm.name, False)  # in a worker that is not forked

    def cleanup(self) -> None:
        """Closes it; the process that made it also removes its name."""
        for memory in (*self.opened_shms, *self.created_shms):
            memory.close()
        for memory in self.created_shms:
            with suppress(FileNotFoundError):
                shm_unlink("/" + memory.name)


class Names:
    """The names of one dataset on this machine.

    Attributes:
        number: what they begin with; the same on all ranks of the machine.
    """

    def __init__(self) -> None:
        self.number = 0
        self._owner: int | None = None
        self._memories: list[Any] = []

    def path(self, name: str) -> str:
        """Of a lock file."""
        return str(lock_folder() / _get_path(self.number, name))

    def keep(self, *memories: Any) -> None:
        """Has memory closed with the rest."""
        self._memories += memories

    def give_back_with(self, dataset: Any) -> None:
        """Gives the names back when `dataset` is collected, or the process ends."""
        weakref.finalize(dataset, self._give_back, os.getpid())

    def take(
        self, streams_local: list[str], streams_remote: Sequence[str | None], world: World, retry: int = 0
    ) -> tuple[int, Any]:
        """In place of Streaming's `get_shm_prefix`. All ranks call it together.

        Args:
            streams_local: folder of each stream.
            streams_remote: not used: several runs may share a folder (see `shared_cache`).
            world: which rank this is.
            retry: not used.

        Returns:
            The number, and the memory that Streaming marks it with.

        Raises:
            ValueError: two streams have the same folder.
            OSError: no lock file can be made.
        """
        _check_self(streams_local)
        mine, problem = 0, None
        if world.is_local_leader:
            try:
                remove_stale()
                mine, self._owner = _new()
                self.number = mine
                marked = Untracked(_get_path(mine, LOCALS), True, 4)
            except OSError as error:
                problem = f"{lock_folder()}: {error.strerror or error}"
        numbers = gather((world.node, mine, problem))
        for _, _, text in numbers:
            if text is not None:
                raise OSError(f"shared memory cannot be made: {text}")
        self.number = next(number for node, number, _ in numbers if node == world.node and number)
        if not world.is_local_leader:
            self._owner = os.open(self.path(_OWNER), os.O_RDWR | os.O_NOFOLLOW)
            fcntl.flock(self._owner, fcntl.LOCK_SH)
            marked = Untracked(_get_path(self.number, LOCALS), False)
        gather(None)  # the first rank may fail and go, and take its lock along, only when all hold theirs
        self.keep(marked)
        return self.number, marked

    def _give_back(self, pid: int) -> None:
        """Closes the memory; whoever comes last removes everything.

        Not in a DataLoader's worker, which has a copy of all this.
        """
        if os.getpid() != pid or self._owner is None:
            return
        for memory in self._memories:
            atexit.unregister(memory.cleanup)
            with suppress(BufferError):  # an array still looks into it
                memory.cleanup()
        # Ours and, of forked workers, the same lock. It is lost where another rank has one; that one will be the last.
        with suppress(OSError):
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(self.number)
        os.close(self._owner)
        self._owner = None


@contextmanager
def own_names() -> Iterator[Names]:
    """While it is open, a dataset that is made takes its names from here; after a mistake they are given back."""
    names = Names()

    def kept(*args: Any, **kwargs: Any) -> Any:
        names.keep(memory := Untracked(*args, **kwargs))
        return memory

    before = streaming_dataset.get_shm_prefix, streaming_array.SharedMemory
    streaming_dataset.get_shm_prefix, streaming_array.SharedMemory = names.take, kept
    try:
        yield names
    except BaseException:
        names._give_back(os.getpid())
        raise
    finally:
        streaming_dataset.get_shm_prefix, streaming_array.SharedMemory = before


@contextmanager
def memories() -> Iterator[list[Any]]:
    """The shared memory that Streaming's dataset makes or opens meanwhile."""
    opened: list[Any] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        opened.append(memory := Untracked(*args, **kwargs))
        return memory

    before, streaming_dataset.SharedMemory = streaming_dataset.SharedMemory, recorded
    try:
        yield opened
    finally:
        streaming_dataset.SharedMemory = before


@contextmanager
def closed_afterwards() -> Iterator[None]:
    """Closes the memory that Streaming's dataset opens meanwhile; it would keep it until the process ends."""
    with memories() as opened:
        try:
            yield
        finally:
            for memory in opened:
                atexit.unregister(memory.cleanup)
                memory.cleanup()


def remove_stale() -> None:
    """Removes what dead processes of this user left, here and in shared memory."""
    with suppress(OSError):
        found = [entry for entry in os.scandir(lock_folder()) if _NAMES.fullmatch(entry.name) and _is_ours(entry)]
        for number in {int(entry.name[:10]) for entry in found}:
            _remove_if_stale(number)


def _is_ours(entry: "os.DirEntry[str]") -> bool:
    with suppress(FileNotFoundError):
        return entry.stat(follow_symlinks=False).st_uid == os.getuid()
    return False


def _remove_if_stale(number: int) -> None:
    owner = lock_folder() / _get_path(number, _OWNER)
    try:
        file = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # The owner's file comes first and goes last: what has none was made by a process that outlived it.
        _remove(number)
        return
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # somebody lives
    else:
        if os.fstat(file).st_nlink:
            log.debug("removing what a dead run left: %s", owner)
            _remove(number)
    finally:
        os.close(file)


def _remove(number: int) -> None:
    for name in SHM_TO_CLEAN:
        with suppress(OSError):
            shm_unlink("/" + _get_path(number, name))
    for name in (BARRIER_FILELOCK, CACHE_FILELOCK, _OWNER):
        with suppress(OSError):
            (lock_folder() / _get_path(number, name)).unlink()


def _new() -> tuple[int, int]:
    """A number that nobody has, and the file whose lock says that it is taken.

    Raises:
        OSError: the file cannot be made, or the file system has no locks.
    """
    while True:
        number = 10**9 + secrets.randbelow(9 * 10**9)
        path = lock_folder() / _get_path(number, _OWNER)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # another run takes it for stale just now, and removes it
            os.close(file)
            continue
        except OSError:
            os.close(file)
            path.unlink()
            raise
        if os.fstat(file).st_nlink:
            with suppress(OSError):  # for people who look there; a disk may be full
                os.write(file, f"process {os.getpid()} in {Path.cwd()}\n".encode())
            return number, file
        os.close(file)


def gather(value: Any) -> list[Any]:
    """The values of all ranks (a collective call where there are several)."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
