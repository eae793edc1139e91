"""Processes of this machine, light ones: a worker imports what a partition needs, and nothing of the command."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Pipe, wait
from typing import Any

from llmtrain.cores import available_cores
from llmtrain.errors import UserError
from llmtrain.prep.engines import Task

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from llmtrain.prep.engines.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_SECONDS_TO_STOP = 5.0


class LocalEngine:
    """Runs units of work in processes of this machine; a single one is this very process.

    Args:
        processes: how many; no more are started than there are units.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes

    def map(self, task: Task, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """See `Engine`. The first error stops all workers; what they had finished stays.

        Raises:
            UserError: a unit raised it, or a worker died.
            RuntimeError: a unit raised another exception; with its traceback.
        """
        processes = min(self._processes, len(numbers))
        if processes <= 1:
            for number in numbers:
                task(number, advance)
            return
        waiting = deque(numbers)
        workers: dict[Any, _Worker] = {}
        with _stopped_by_sigterm():
            try:
                for _ in range(processes):
                    worker = _Worker(task, threads=max(1, available_cores() // processes))
                    workers[worker.connection] = worker
                    worker.give(waiting.popleft())
                while workers:
                    for connection in wait(list(workers)):
                        worker = workers[connection]
                        if not worker.listen(advance):
                            continue
                        if waiting:
                            worker.give(waiting.popleft())
                        else:
                            worker.dismiss()
                            del workers[connection]
            finally:
                for worker in workers.values():
                    worker.stop()


class _Worker:
    def __init__(self, task: Task, *, threads: int) -> None:
        self.connection, theirs = Pipe()
        self.number: int | None = None
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        # The cores are shared out among the processes, not taken by each for itself.
        limits = {"RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        limits["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, **limits}
        )
        theirs.close()
        self._send(task)

    def give(self, number: int) -> None:
        """Let it do a unit."""
        self.number = number
        self._send(number)

    def listen(self, advance: Callable[[int], None]) -> bool:
        """Take one message; returns whether the unit is done.

        Raises:
            UserError: the unit raised it, or the process is no more.
            RuntimeError: the unit raised something else.
        """
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise self._death() from None
        if kind == "bytes":
            advance(content)
        elif kind == "mistake":
            raise content
        elif kind == "error":
            raise RuntimeError(f"partition {self.number} failed:\n{content}")
        return bool(kind == "done")

    def dismiss(self) -> None:
        """There is nothing more to do."""
        self.connection.close()
        self._process.wait()

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def _send(self, content: Any) -> None:
        try:
            self.connection.send(content)
        except (ConnectionResetError, BrokenPipeError):
            raise self._death() from None

    def _death(self) -> UserError:
        status = self._process.wait()
        how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
        memory = ". Linux kills processes when memory runs out" if status == -signal.SIGKILL else ""
        what = "before it began" if self.number is None else f"while it worked on partition {self.number}"
        return UserError(
            f"worker process {self._process.pid} {how} {what}{memory}. What is finished is kept: run the same command "
            "again, with fewer --processes if memory is short"
        )


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like an exception, so that the workers are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
