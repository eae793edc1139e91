"""Progress of long work: a bar on a terminal, a line every few seconds in a log, with rate and time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0

Unit = Literal["bytes", "tokens", "sequences"]
Advance = Callable[[int], None]
"""Call it with how much was done since the last call."""


@contextmanager
def progress(console: Console, what: str, total: int | None, unit: Unit) -> Iterator[Advance]:
    """Show how far `what` has come.

    Args:
        console: where to; a bar when it is a terminal, otherwise plain lines.
        what: two or three words.
        total: how much there is to do; None when that is not known.
        unit: what is counted; bytes are shown as megabytes.
    """
    if not console.is_terminal:
        yield _lines(console, what, total, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Done(unit), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
        bar.update(task, total=bar.tasks[task].completed)  # the total may have been an estimate


def _amount(n: float, unit: Unit) -> str:
    return f"{n / 1e6:,.1f}" if unit == "bytes" else f"{n:,.0f}"


def _of(done: float, total: float | None, unit: Unit) -> str:
    of = "" if total is None else f" of {_amount(total, unit)}"
    return f"{_amount(done, unit)}{of} {'MB' if unit == 'bytes' else unit}"


def _rate(rate: float, unit: Unit) -> str:
    return f"{rate / 1e6:.2f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"


class _Done(ProgressColumn):
    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(_of(task.completed, task.total, self._unit))


class _Rate(ProgressColumn):
    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _rate(speed, self._unit))


def _lines(console: Console, what: str, total: int | None, unit: Unit) -> Advance:
    start = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES:
            return
        said = now
        rate = done / (now - start)
        left = "" if total is None else f", {max(0.0, total - done) / max(rate, 1e-9):.0f} s left"
        console.print(f"{what}: {_of(done, total, unit)}, {_rate(rate, unit)}{left}", highlight=False)

    return advance
