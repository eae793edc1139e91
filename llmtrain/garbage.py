"""Python's garbage collector, kept away from where it has nothing to find."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """For a block of imports: nothing is collected inside, and what is there at its end is never looked through again.

    Torch and Composer make 600,000 objects that the collector knows, and nearly all of them stay. Looking through them
    while they come takes a sixth of the time of the import, and each full collection later 0.4 s.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries complain at the end of what is not freed
        if collects:
            gc.enable()


@contextmanager
def collected_afterwards() -> Iterator[None]:
    """Frees the cycles that are made inside, at once and without a look at the other objects of the process.

    Python looks for cycles among objects that have lived for a while only when these have become a quarter more. Until
    then large cycles, like matplotlib's figures of 3 MB, pile up to hundreds of MB.
    """
    collects = gc.isenabled()
    gc.disable()  # so that all of them are still young at the end
    try:
        yield
    finally:
        gc.collect(0)
        if collects:
            gc.enable()
