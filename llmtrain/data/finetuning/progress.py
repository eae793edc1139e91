"""How many examples are done, how fast, and how long it will still take: a bar on a terminal, lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BEFORE_FIRST = 2.0
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counted(console: Console, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how far `what` has come; call the result with the rows that were done since the last call.

    Nothing is said about what takes less than two seconds.

    Args:
        console: where to.
        what: a few words.
        total: rows to do, roughly; None when that is not known.
    """
    start = said = time.monotonic()
    rows = 0
    bar: Progress | None = None

    def done(more: int) -> None:
        nonlocal rows, said, bar
        rows += more
        now = time.monotonic()
        if now - start < _SECONDS_BEFORE_FIRST:
            return
        rate = rows / (now - start)
        if console.is_terminal:
            if bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
                bar = Progress(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=console)
                bar.start()
                bar.add_task(what, total=total, rate="")
            bar.update(bar.task_ids[0], completed=rows, rate=f"{rate:,.0f} examples/s")
        elif now - said > _SECONDS_BETWEEN_LINES or said == start:
            said = now
            of = "" if total is None else f" of about {total:,}"
            left = "" if total is None else f", {max(0, total - rows) / rate:.0f} s left"
            line = f"{what}: {rows:,}{of}, {rate:,.0f} examples/s{left}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    try:
        yield done
    finally:
        if bar is not None:
            bar.stop()
