"""How this process keeps memory that was freed, and how much is left on its host."""

import ctypes
from contextlib import suppress
from pathlib import Path


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks for the next step instead of returning them to the kernel.

    Activations and logits are allocated anew in each step; without this every one of their pages is faulted in again, a
    seventh of the CPU time of a small step (docs/log.md). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be used without swapping: of the machine, and of the job's control group where it has one.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        None where the system does not say.
    """
    found = []
    with suppress(ValueError, IndexError):  # a system that says it in another way
        for line in _text(root / "proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        for limit, used, reclaimable in _limits(root):
            if limit < 2**60:  # version 1 says "none" with a number
                found.append(max(0, limit - used + reclaimable))
    return min(found) if found else None


def _limits(root: Path) -> list[tuple[int, int, int]]:
    """Limit, use and what of that can be dropped, of each control group from this process's own upwards."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file ")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        else:
            continue
        group = base / path.lstrip("/")
        for place in (group, *group.parents):
            limit, used = _text(place / names[0]).strip(), _text(place / names[1]).strip()
            if limit.isdecimal() and used.isdecimal():
                stat = _text(place / "memory.stat").splitlines()
                cached = next((int(row.split()[1]) for row in stat if row.startswith(names[2])), 0)
                found.append((int(limit), int(used), cached))
            if place == base:
                break
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
