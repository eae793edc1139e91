"""How much memory this process needed for something, at its peak."""

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmtrain.checkpoint.heap import give_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Filled when the block ends."""

    bytes = 0
    """Above what the process had before."""


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures resident memory, mapped pages of files included, while the block runs.

    Linux counts the peak from the block's beginning; elsewhere an earlier peak can hide a smaller one.
    """
    found = Peak()
    gc.collect()
    give_back()  # what is free already must not hide what is needed
    with suppress(OSError):
        _CLEAR.write_text("5")  # VmHWM begins anew
    before = _resident("VmRSS")
    yield found
    found.bytes = max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    with suppress(OSError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
