"""Progress of an engine that does not report it, looked at from time to time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def watched(value: Callable[[], int], advance: Callable[[int], None]) -> Iterator[None]:
    """Hand on what a counter gains while the block runs.

    Args:
        value: reads the counter.
        advance: is called with what it has gained, from another thread.
    """
    over = threading.Event()
    seen = 0

    def look() -> None:
        nonlocal seen
        now = value()
        if now > seen:
            advance(now - seen)
            seen = now

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
