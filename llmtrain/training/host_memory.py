"""How this process keeps memory that was freed."""

import ctypes


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
