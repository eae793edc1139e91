"""A real training run of several ranks, in a few seconds.

Importing Composer takes longer than training a tiny model. So ranks are forked from a server process that has done the
imports (the standard library's forkserver); apart from that they are what the launcher starts: processes of their own
with the same environment variables. `launcher_command` gives the command line that a user would type.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.testing.ranks import as_if_launched, preload
from llmtrain.training.loss_curve import read_metrics


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        codes: exit code of each rank; negative for a signal.
        output: what all ranks printed.
        folder: the run's folder.
    """

    codes: tuple[int, ...]
    output: str
    folder: Path

    @property
    def code(self) -> int:
        """0, or the first exit code that is not."""
        return next((code for code in self.codes if code), 0)

    def metrics(self, key: str) -> dict[int, Any]:
        """One metric of metrics.jsonl by step."""
        return read_metric(self.folder, key)


def read_metric(run: Path, key: str) -> dict[int, Any]:
    """One metric of a run's metrics.jsonl by step."""
    return {int(row["step"]): row[key] for row in read_metrics(run / "metrics.jsonl") if key in row}


class Run:
    """Ranks that are training `recipe` in the working directory `cwd`.

    Args:
        recipe: a training recipe.
        overrides: `key=value`, as on the command line.
        ranks: number of processes.
        cwd: where `runs/` goes.
    """

    def __init__(self, recipe: Path, overrides: Sequence[str] = (), *, ranks: int, cwd: Path) -> None:
        name = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("run_name=")), recipe.stem)
        self.folder = cwd / "runs" / name
        self.log = cwd / f"{name}-{time.monotonic_ns()}.log"
        context = multiprocessing.get_context("forkserver")
        preload()
        port = _free_port()
        arguments = [str(recipe), *overrides]
        self.processes = [
            context.Process(target=_rank, args=(rank, ranks, port, str(cwd), str(self.log), arguments))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, text: str, timeout: float = 600) -> None:
        """Returns when a rank has printed `text`.

        Raises:
            TimeoutError: it did not, or the run ended before.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output():
            if time.monotonic() > deadline or not any(process.is_alive() for process in self.processes):
                raise TimeoutError(f"{text!r} did not appear in:\n{self.output()}")
            time.sleep(0.002)

    def send(self, signum: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to all ranks, or to some."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signum)

    def output(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout: float = 900) -> Finished:
        """Waits for the end; when a rank fails, the others are killed after ten seconds, as a launcher does.

        Raises:
            TimeoutError: it took longer than `timeout` seconds (the ranks are killed then).
        """
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                failed = any(process.exitcode for process in self.processes)
                self.send(signal.SIGKILL)
                if not failed:
                    raise TimeoutError(f"not finished after {timeout} s:\n{self.output()}")
            time.sleep(0.02)
        codes = tuple(process.exitcode or 0 for process in self.processes)
        return Finished(codes, self.output(), self.folder)


def launch(recipe: Path, overrides: Sequence[str] = (), *, ranks: int = 1, cwd: Path, timeout: float = 900) -> Finished:
    """Trains `recipe` with `ranks` processes in the working directory `cwd`, and waits for the end.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
    """
    return Run(recipe, overrides, ranks=ranks, cwd=cwd).wait(timeout)


def launcher_command(recipe: Path, overrides: Sequence[str] = (), *, ranks: int = 1) -> list[str]:
    """The command line of the same run through Composer's launcher."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    return [*launcher, "-m", "llmtrain.training.command", str(recipe), *overrides]


def launcher_environment() -> dict[str, str]:
    """The environment for that: no rank of an outer launch, W&B offline, one thread a process."""
    outer = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "NODE_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return {**inherited, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _rank(rank: int, ranks: int, port: int, cwd: str, log: str, arguments: list[str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    as_if_launched()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WANDB_MODE="offline",
    )
    from llmtrain.training.command import main

    sys.exit(main(arguments))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
