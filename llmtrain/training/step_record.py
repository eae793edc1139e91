"""What each step of a run was made of and what it came to, exactly: what `llmtrain certify` compares."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from composer import Callback, Logger, State
from composer.utils import dist

from llmtrain.data.batch import sample_ids

VARIABLE = "LLMTRAIN_STEP_RECORD"
"""Environment variable: with `1`, runs keep the record. It gathers from all ranks at each step."""

STEPS = "steps.jsonl"
"""In the run's folder: a line a step. `samples`: of each rank the samples of each row; `loss` and `lr`: as hexadecimal
floats, which lose no bit; `rng`: of each rank a hash of its random state after the step."""

PHASE = "phase"
"""In the run's folder: what the run is doing now, and the step it continued from."""


def step_record(run: Path, shared_by: int = 1) -> list[Callback]:
    """The callback, where the environment asks for it.

    Args:
        run: the run's folder.
        shared_by: consecutive ranks that have the same samples.
    """
    return [StepRecord(run, shared_by)] if os.environ.get(VARIABLE) == "1" else []


class StepRecord(Callback):  # type: ignore[misc]
    """Writes RUN/steps.jsonl, each step once: a resumed run first drops the lines of steps that it will repeat.

    Args:
        run: the run's folder.
        shared_by: consecutive ranks that have the same samples.
    """

    def __init__(self, run: Path, shared_by: int) -> None:
        self.steps = run / STEPS
        self._phase = run / PHASE
        self.shared_by = shared_by
        self._last = 0
        self._began = 0
        self._writes = dist.get_global_rank() == 0

    def after_load(self, state: State, logger: Logger) -> None:
        self._began = int(state.timestamp.batch)
        self._forget_after(self._began)
        self._say("loaded")

    def fit_start(self, state: State, logger: Logger) -> None:
        self._say("training")

    def eval_start(self, state: State, logger: Logger) -> None:
        self._say("evaluation")

    def eval_end(self, state: State, logger: Logger) -> None:
        self._say("training")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Adds the step of all ranks (a collective call)."""
        ranks = dist.all_gather_object((sample_ids(state.batch), random_state()))
        if not self._writes:
            return
        step = int(state.timestamp.batch)
        if step <= self._last:  # went back to a checkpoint, without a new start
            self._forget_after(step - 1)
        row = {
            "step": step,
            "epoch": int(state.timestamp.epoch),
            "samples": [samples for samples, _ in ranks[:: self.shared_by]],
            "loss": {name: float(value).hex() for name, value in (state.total_loss_dict or {}).items()},
            "lr": [float(group["lr"]).hex() for optimizer in state.optimizers for group in optimizer.param_groups],
            "rng": [found for _, found in ranks],
        }
        with self.steps.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._last = step

    def _forget_after(self, step: int) -> None:
        self._last = step
        if self._writes and self.steps.exists():
            kept = [row for row in read_steps(self.steps) if row["step"] <= step]
            temporary = self.steps.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.steps)

    def _say(self, phase: str) -> None:
        if self._writes:
            temporary = self._phase.with_suffix(".tmp")
            temporary.write_text(f"{phase} {self._began}")
            temporary.replace(self._phase)


def random_state() -> str:
    """A hash of this rank's random states: Python's, numpy's, torch's, the GPU's."""
    kind, keys, *position = np.random.get_state()
    found = xxhash.xxh128(repr((random.getstate(), kind, position)).encode())
    found.update(np.asarray(keys).tobytes())
    found.update(torch.random.get_rng_state().numpy().tobytes())
    if torch.cuda.is_available():
        found.update(torch.cuda.get_rng_state().numpy().tobytes())
    return found.hexdigest()


def read_steps(file: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that a crash cut off is left out."""
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
