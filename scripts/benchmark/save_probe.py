"""Runs inside the ranks of `save.py`, as code of its recipe: every other save is made to wait, and all is timed."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.training import checkpoint_saver
from llmtrain.training.checkpoint_saver import CheckpointSaver
from llmtrain.training.saved_state import HostMemory

_output = Path(os.environ["SAVE_BENCHMARK"])
_save, _batch_checkpoint = CheckpointSaver._save_in_time, CheckpointSaver.batch_checkpoint
_now: dict[str, Any] = {"saves": 0, "row": {}, "last": None}


def _timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the seconds of each call to the row of this step."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _now["row"][what] = _now["row"].get(what, 0.0) + time.perf_counter() - started

    return call


def _save_in_time(self: CheckpointSaver, state: Any) -> None:
    row = _now["row"]
    started = time.perf_counter()
    self.finish()  # a save takes as long as it takes; the wait for the one before is a cost of that one
    row["waited"] = time.perf_counter() - started
    self._asynchronous = _now["saves"] % 2 == 0
    _now["saves"] += 1
    row["way"] = "beside" if self._asynchronous else "waiting"
    started, cpu = time.perf_counter(), time.thread_time()
    _save(self, state)
    row["stall"], row["stall_cpu"] = time.perf_counter() - started, time.thread_time() - cpu


def _a_step(self: CheckpointSaver, state: Any, logger: Any) -> None:
    """Writes a line a step: its own seconds, and what the saver has taken of the training thread at its end."""
    begun = time.perf_counter()
    row = _now["row"] = {"step": int(state.timestamp.batch), "beside_a_save": self._in_flight is not None}
    _batch_checkpoint(self, state, logger)
    ended = time.perf_counter()
    if os.environ["RANK"] == "0" and _now["last"] is not None:
        asked = ended - begun - row.get("stall", 0.0) - row.get("waited", 0.0)  # whether a save in flight has ended
        row["seconds"] = begun - _now["last"] + asked
        with _output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    _now["last"] = time.perf_counter()


checkpoint_saver.state_to_save = _timed("gather", checkpoint_saver.state_to_save)
checkpoint_saver.TakenState = _timed("take", checkpoint_saver.TakenState)  # type: ignore[misc,assignment]
HostMemory.copies_of = _timed("copy", HostMemory.copies_of)  # type: ignore[method-assign]
CheckpointSaver._save_in_time = _save_in_time  # type: ignore[method-assign]
CheckpointSaver.batch_checkpoint = _a_step  # type: ignore[method-assign]
