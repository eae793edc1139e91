"""Runs inside the ranks of `save.py`, as code of its recipe: every other save is made to wait, and all is timed."""

import json
import os
import time
from pathlib import Path
from typing import Any

from llmtrain.training.checkpoint_saver import CheckpointSaver

_output = Path(os.environ["SAVE_BENCHMARK"])
_look, _batch_checkpoint = CheckpointSaver._save_in_time, CheckpointSaver.batch_checkpoint
_now: dict[str, Any] = {"saves": 0, "way": None, "last": None}


def _save_in_time(self: CheckpointSaver, state: Any) -> None:
    self.finish()  # what is measured is the save, not the wait for the one before
    self._asynchronous = _now["saves"] % 2 == 0
    _now["saves"] += 1
    _now["way"] = "beside" if self._asynchronous else "waiting"
    started = time.perf_counter()
    _look(self, state)
    _now["stall"] = time.perf_counter() - started


def _timed(self: CheckpointSaver, state: Any, logger: Any) -> None:
    """Writes a line a step: its own seconds without saves, and what a save has taken of the training thread."""
    begun = time.perf_counter()
    busy = self._in_flight is not None
    _now["way"], _now["stall"] = None, 0.0
    _batch_checkpoint(self, state, logger)
    if os.environ["RANK"] == "0" and _now["last"] is not None:
        row = {
            "step": int(state.timestamp.batch),
            "seconds": begun - _now["last"],
            "beside_a_save": busy,
            "way": _now["way"],
            "stall": _now["stall"],
        }
        with _output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    _now["last"] = time.perf_counter()


CheckpointSaver._save_in_time = _save_in_time  # type: ignore[method-assign]
CheckpointSaver.batch_checkpoint = _timed  # type: ignore[method-assign]
