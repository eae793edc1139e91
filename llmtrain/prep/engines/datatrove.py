"""datatrove's local executor as engine; its SLURM and Ray executors take the steps of `llmtrain.prep.datatrove`."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.prep.engines import Task
from llmtrain.prep.engines.remote_unit import Mistake, Unit, mistake_in
from llmtrain.prep.engines.watch import watched


class DatatroveEngine:
    """Runs units of work as the tasks of a `LocalPipelineExecutor`, one process each.

    Args:
        processes: tasks at a time.

    Raises:
        UserError: datatrove is not installed.
    """

    def __init__(self, processes: int) -> None:
        try:
            import datatrove.executor.local  # noqa: F401
        except ImportError as problem:
            raise UserError(f"--engine datatrove: {problem}: pip install 'llmtrain[datatrove]'") from problem
        self._processes = processes

    def map(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """See `Engine`. `advance` learns of bytes when a unit is done.

        Raises:
            UserError: a unit raised it.
            Exception: a unit raised it; with its traceback.
        """
        from datatrove.executor.local import LocalPipelineExecutor

        # What is done, our own markers know: datatrove's would outlive an output that was discarded.
        with tempfile.TemporaryDirectory(prefix="llmtrain-datatrove-") as logs:
            done = Path(logs) / "bytes"
            done.mkdir()
            executor = LocalPipelineExecutor(
                pipeline=[_Step(Unit.of(task), tuple(numbers), done)],
                tasks=len(numbers),
                workers=min(self._processes, len(numbers)),
                logging_dir=logs,
                skip_completed=False,
            )
            _quiet()
            try:
                with watched(lambda: _sum(done), advance):
                    executor.run()
            except Mistake as mistake:
                raise mistake_in(str(mistake)) or mistake from mistake


class _Step:
    """A step of a pipeline: a rank's unit."""

    def __init__(self, unit: Unit, numbers: tuple[int, ...], done: Path) -> None:
        self._unit = unit
        self._numbers = numbers
        self._done = done

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _quiet()  # in the worker, before the executor's first line

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        n_bytes = self._unit(self._numbers[rank])
        (self._done / f"{rank}-{n_bytes}").touch()


def _quiet() -> None:
    """A report of each task on the terminal would bury the progress; exceptions come to the command anyway."""
    from loguru import logger

    logger.disable("datatrove")


def _sum(folder: Path) -> int:
    return sum(int(path.name.partition("-")[2]) for path in folder.iterdir())
