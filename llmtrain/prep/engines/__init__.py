"""Who carries out the units of work: processes of this machine, Spark, datatrove's executors."""

from collections.abc import Callable, Sequence
from typing import Protocol


class Task(Protocol):
    """A kind of work, `functools.partial(make_partition, job)`: it pickles, and any of its units may run anywhere.

    A unit that is done already does nothing, and one that was interrupted starts from its beginning.
    """

    def __call__(self, number: int, advance: Callable[[int], None] | None = None) -> None:
        """Do one unit; `advance` is called with bytes as they are done."""


class Engine(Protocol):
    """Runs a task for many numbers."""

    def map(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """Call `task(number)` for each number, in any order, anywhere; returns when all of them are done.

        Args:
            task: what to do.
            numbers: of the units.
            advance: to be called here with bytes that were done, where the engine learns of them.

        Raises:
            UserError: a unit raised it, or the engine cannot be had or lost a worker.
        """
