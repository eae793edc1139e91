"""One command, measured with all the processes it starts: wall and CPU seconds, and the most memory at once."""

import ctypes
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PR_SET_CHILD_SUBREAPER = 36
_EVERY = 0.05  # seconds between two looks at the memory


class Run(NamedTuple):
    wall: float
    """Seconds until the command ended."""
    cpu: float
    """User and system seconds of it and all it started."""
    peak_mb: float
    """Most proportional set size (PSS: shared pages count once) of all its processes together, in 10^6 bytes."""
    peak_of_one_mb: float
    """Most of one of them."""


def run(command: Sequence[str], env: Mapping[str, str], log: Path) -> Run:
    """Run a command; what it prints goes to `log`.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    # Children that lose their parent become ours: otherwise nobody could add up what they used.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = [0.0, 0.0]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, ended))
    with log.open("wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=dict(env), stdout=file, stderr=subprocess.STDOUT)
        watcher.start()
        status = process.wait()
        wall = time.perf_counter() - start
    ended.set()
    watcher.join()
    _reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise subprocess.CalledProcessError(status, command)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, *peak)


def _watch(peak: list[float], ended: threading.Event) -> None:
    while not ended.wait(_EVERY):
        sizes = [_pss(pid) / 1e6 for pid in _descendants(os.getpid())]
        peak[:] = max(peak[0], sum(sizes)), max(peak[1], *sizes, 0.0)


def _descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(folder.name))
    waiting = children.get(root, [])
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        yield pid


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _reap(seconds: float = 10) -> None:
    """Wait for the processes that the command left behind, so that they are counted."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)
