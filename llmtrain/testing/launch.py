"""A real training run, started as a user starts it: the composer launcher in a subprocess."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Attributes:
        code: exit code of the launcher.
        output: standard output and error of rank 0 and the launcher, as a user saw them.
        folder: the run's folder.
    """

    code: int
    output: str
    folder: Path

    def metrics(self, key: str) -> dict[int, Any]:
        """One metric of metrics.jsonl by step."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row[key] for row in rows if key in row}


def command(recipe: Path, overrides: Sequence[str] = (), *, ranks: int = 1) -> list[str]:
    """The command line of a training run with `ranks` processes on this machine."""
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks)]
    return [*launcher, "-m", "llmtrain.training.command", str(recipe), *overrides]


def environment() -> dict[str, str]:
    """The environment for a run: no rank of an outer launch, W&B offline, one thread a process."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_", "LOCAL_", "MASTER_", "NODE_"))
    }
    return {**inherited, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def launch(recipe: Path, overrides: Sequence[str] = (), *, ranks: int = 1, cwd: Path, timeout: float = 300) -> Finished:
    """Trains `recipe` with `ranks` processes in the working directory `cwd`, and waits for the end.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    done = subprocess.run(
        command(recipe, overrides, ranks=ranks),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    name = next((o.split("=", 1)[1] for o in reversed(overrides) if o.startswith("run_name=")), recipe.stem)
    return Finished(done.returncode, done.stdout, cwd / "runs" / name)
