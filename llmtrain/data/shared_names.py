"""Datasets of one machine are made one after another.

Streaming names a dataset's shared memory by the first number that is free on the machine, and looks for it without a
lock: two runs that start at once find the same one. Then one of them fails, or both read each other's state.
"""

import atexit
import fcntl
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streaming.base.shared import prefix
from streaming.base.world import World
from torch import distributed as dist

log = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PATIENCE = 120.0
"""Seconds to wait for other runs; making a dataset reads its index and no shards."""


def lock_file() -> Path:
    """The lock of this user on this machine.

    It lies with the shared memory that it guards, where the system has a folder for that: containers often share their
    temporary folder and not their shared memory, or the other way round. Never in TMPDIR, which each run changes.
    """
    folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path("/tmp")
    return folder / f"llmtrain-{os.getuid()}.lock"


@contextmanager
def one_dataset_at_a_time(patience: float = _PATIENCE) -> Iterator[None]:
    """Keeps other runs on this run's machines from making a dataset meanwhile. All ranks enter together.

    Local rank 0 holds the lock, and no rank goes in before that. Ranks try, and when one node has not got it, all give
    it back: two runs over the same two nodes cannot wait for each other.

    Args:
        patience: Seconds after which the run goes on without the lock, and says so: another process may hang while it
            holds it, and two "nodes" of one run may share a machine.
    """
    give_up = time.monotonic() + patience
    leads = World.detect().is_local_leader
    while True:
        held, failed = _try() if leads else (None, False)
        missing, late = _anywhere(leads and held is None, failed or time.monotonic() > give_up)
        if not missing or late:
            break
        if held is not None:
            os.close(held)
        time.sleep(random.uniform(0.01, 0.05))
    if leads and held is None:
        log.warning("%s: not to be had; going on without. Another run may start on this machine now", lock_file())
    try:
        with _names_are_let_go():
            yield
    finally:
        if held is not None:
            os.close(held)


@contextmanager
def _names_are_let_go() -> Iterator[None]:
    """Closes what Streaming opens to see which names are taken.

    It opens the shared memory of every dataset on the machine for that, and keeps it open until the process ends: a
    process that makes a hundred datasets has ten thousand files open.
    """
    opened: list[Any] = []

    class Recorded(prefix.SharedMemory):  # type: ignore[misc]
        def __init__(self, name: str | None = None, create: bool | None = None, *args: Any, **kwargs: Any) -> None:
            super().__init__(name, create, *args, **kwargs)
            if create is False:
                opened.append(self)

    original, prefix.SharedMemory = prefix.SharedMemory, Recorded
    try:
        yield
    finally:
        prefix.SharedMemory = original
        for memory in opened:
            atexit.unregister(memory.cleanup)
            memory.cleanup()


def _try() -> tuple[int | None, bool]:
    """The locked file, or None; and whether there is no use in trying again."""
    try:
        file = os.open(lock_file(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None, True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None, False
    return file, False


def _anywhere(*mine: bool) -> list[bool]:
    """Whether each is true on any rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(mine)
    everyone: list[tuple[bool, ...]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [any(values) for values in zip(*everyone, strict=True)]
