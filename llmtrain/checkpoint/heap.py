"""Memory that was freed, given back to the system.

glibc keeps freed blocks of up to 32 MB for itself, and many a weight is one: after some hundred tensors of several
sizes the process held half a gigabyte more than it used (measured with a model of 1 GB).
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache


def give_back() -> None:
    """Return what is free to the system, where the C library can; takes about a millisecond."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    with suppress(OSError, AttributeError, TypeError):
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim  # glibc's only
        return found
    return None
