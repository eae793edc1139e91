"""A lock on storage that has none: best effort, by files that say who holds it."""

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.errors import UserError
from llmtrain.prep import storage
from llmtrain.prep.stores.open import open_store
from llmtrain.prep.stores.retry import persistently
from llmtrain.redaction import without_password

log = logging.getLogger(__name__)

HEARTBEAT, STALE = 30.0, 300.0  # seconds
_lost: set[str] = set()


@contextmanager
def remote_lock(folder: str, *, shared: bool, wait: bool) -> Iterator[None]:
    """Hold the lock that a remote folder stands for.

    Each process puts a file into the folder and then looks for others' files: of two that come at the same time at
    least one sees the other, and both step back and try again. So the lock needs no more of a storage than that what
    was written is listed. The file is written again every 30 seconds; one that is 5 minutes older than our own, both by
    the storage's clock, or whose process on this machine is gone, counts for nothing.

    What this cannot prevent: a process that is stopped for more than 5 minutes and then goes on, beside its successor.
    It notices that at its next heartbeat (see `require_not_lost`). Both would write the same bytes.

    Args:
        folder: URL of a folder for nothing else.
        shared: with others that hold it shared.
        wait: until it is free.

    Raises:
        UserError: another process holds it, and `wait` is off.
    """
    mine = f"{folder}/{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
    held = False
    try:
        _acquire(folder, mine, shared=shared, wait=wait)
        held = True
        stop = threading.Event()
        heart = threading.Thread(target=_beat, args=(mine, shared, stop), name="lock-heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
    finally:
        try:
            _remove(mine)
            store, _, path = open_store(folder)
            persistently(lambda: store.prune(path.partition("/.work/")[0] + "/.work"), f"deleting {folder}")
        except UserError as problem:
            if held:
                log.warning("the lock stays behind for %d minutes: %s", STALE // 60, problem)
        _lost.discard(mine)


def require_not_lost(out: str) -> None:
    """Refuse to write when this process lost a lock below `out`.

    Raises:
        UserError: it did.
    """
    if any(lock.startswith(f"{out}/") for lock in _lost):
        raise UserError(
            f"{out}: this process could not renew its lock for {STALE // 60:.0f} minutes, and another may have taken "
            "over. Run the command again: it goes on from what is finished"
        )


class _Holder(NamedTuple):
    host: str
    boot: str
    pid: int
    since: str
    shared: bool
    held: bool

    def is_gone(self) -> bool:
        """Whether it ran on this machine, and does not any more."""
        return self.boot == _boot() and not Path(f"/proc/{self.pid}").exists()


def _acquire(folder: str, mine: str, *, shared: bool, wait: bool) -> None:
    for attempt in range(1 << 60):
        _write(mine, shared=shared, held=False)
        others = list(_others(folder, mine, shared))
        if not others:
            _write(mine, shared=shared, held=True)
            return
        _remove(mine)
        holders = [other for other in others if other.held]
        if not wait and (holders or attempt >= 20):
            who = (holders or others)[0]
            out = without_password(folder.partition("/.work/")[0])
            raise UserError(
                f"{out}: process {who.pid} on {who.host} is at work there, "
                f"since {who.since}. Wait for it, or stop it. If it is gone already, its lock expires "
                f"{STALE // 60:.0f} minutes after its last sign of life"
            )
        time.sleep(random.uniform(0.05, 0.5) if not holders else random.uniform(1, 3))


def _others(folder: str, mine: str, shared: bool) -> Iterator[_Holder]:
    """Those who hold the lock, or ask for it, so that we cannot have it."""
    store, root, path = open_store(f"{folder}/")
    listed = persistently(lambda: list(store.files(path, 0)), f"listing {folder}")
    files = {root + file.path: file for file in listed}
    now = files[mine].mtime if mine in files else None
    for url, file in files.items():
        if url == mine:
            continue
        data = storage.read_bytes(url)
        try:
            holder = _Holder(**json.loads(data)) if data is not None else None
        except (ValueError, TypeError):
            holder = _Holder("?", "", 0, "?", False, True)  # of another version: it may well be alive
        if holder is None:
            continue
        if holder.is_gone() or (now is not None and now - file.mtime > STALE * 1e9):
            _remove(url)
        elif not (shared and holder.shared):
            yield holder


def _beat(mine: str, shared: bool, stop: threading.Event) -> None:
    last = time.monotonic()
    while not stop.wait(HEARTBEAT):
        try:
            if time.monotonic() - last > STALE / 2 and storage.read_bytes(mine) is None:
                break  # this process slept, and somebody took the lock
            _write(mine, shared=shared, held=True)
            last = time.monotonic()
        except UserError as problem:
            log.warning("the lock could not be renewed: %s", problem)
            if time.monotonic() - last > STALE:
                break
    else:
        return
    _lost.add(mine)


def _write(url: str, **state: bool) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    content: dict[str, Any] = _Holder(socket.gethostname(), _boot(), os.getpid(), since, **state)._asdict()
    store, _, path = open_store(url)
    persistently(lambda: store.put(path, json.dumps(content).encode()), f"writing {url}")


def _remove(url: str) -> None:
    store, _, path = open_store(url)
    persistently(lambda: store.remove(path), f"deleting {url}")


def _boot() -> str:
    """Identifies what process ids belong to: a boot of a machine and a namespace in it; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"unknown {uuid.uuid4()}"
