"""A real training run of several ranks, in a few seconds.

The processes are those of `llmtrain.certify.processes`, which are spared the imports. `launcher_command` gives the
command line that a user would type.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.certify.processes import Ranks
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
        environment: variables that the ranks have besides those that the fork server was started with.
    """

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str] = (),
        *,
        ranks: int,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        name = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("run_name=")), recipe.stem)
        self.folder = cwd / "runs" / name
        self.log = cwd / f"{name}-{time.monotonic_ns()}.log"
        arguments = [str(recipe), *overrides, *trust_in_own(recipe)]
        self.ranks = Ranks(arguments, ranks, cwd=cwd, log=self.log, environment=environment)
        self.processes = self.ranks.processes

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
        self.ranks.send(signum, ranks)

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


def launch(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    ranks: int = 1,
    cwd: Path,
    timeout: float = 900,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Trains `recipe` with `ranks` processes in the working directory `cwd`, and waits for the end.

    Raises:
        TimeoutError: it took longer than `timeout` seconds.
    """
    return Run(recipe, overrides, ranks=ranks, cwd=cwd, environment=environment).wait(timeout)


def launcher_command(recipe: Path, overrides: Sequence[str] = (), *, ranks: int = 1) -> list[str]:
    """The command line of the same run through Composer's launcher."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    return [*launcher, "-m", "llmtrain.training.command", str(recipe), *overrides, *trust_in_own(recipe)]


def trust_in_own(recipe: Path) -> list[str]:
    """`--trust-code` where a test's recipe has code_paths of its own."""
    return ["--trust-code"] if recipe.is_file() and "code_paths:" in recipe.read_text() else []


def launcher_environment() -> dict[str, str]:
    """The environment for that: no rank of an outer launch, W&B offline, one thread a process."""
    outer = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "NODE_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return {**inherited, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
