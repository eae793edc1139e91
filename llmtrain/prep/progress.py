"""Progress on a terminal (a bar) and in a log (a line every few seconds), with rate and time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Call it with the bytes that were done since the last call."""

    def __call__(self, n_bytes: int) -> None: ...  # noqa: D102


@contextmanager
def progress(console: Console, what: str, total: int | None) -> Iterator[Advance]:
    """Show how far `what` has come.

    Args:
        console: where to; a bar when it is a terminal, otherwise plain lines.
        what: two or three words.
        total: bytes to do; None when that is not known.
    """
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n_bytes: bar.advance(task, n_bytes)
        bar.update(task, total=bar.tasks[task].completed)  # the estimate was the files' size


def _lines(console: Console, what: str, total: int | None) -> Advance:
    start = said = time.monotonic()
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done, said
        done += n_bytes
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES:
            return
        said = now
        rate = done / (now - start)
        of = "" if total is None else f" of {total / 1e6:.1f}"
        left = "" if total is None else f", {max(0.0, total - done) / max(rate, 1):.0f} s left"
        console.print(f"{what}: {done / 1e6:.1f}{of} MB, {rate / 1e6:.2f} MB/s{left}", highlight=False)

    return advance
