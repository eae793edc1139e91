"""Long work that comes on is told to whoever looks for hangs."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.evaluation.icl.task import TaskScores
from llmtrain.training import agreement, save_job
from llmtrain.training.hashed_files import HashedFile, write_full
from llmtrain.training.icl_callback import TaskEvaluation
from llmtrain.training.save_job import SaveThread


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    times: list[int] = []
    monkeypatch.setattr(agreement, "after_each_turn", [lambda: times.append(1)])
    return times


class Task:
    """Of three batches."""

    label = "task"

    def evaluate(self, model: Any, ranks: Any, *, sharded: bool, advance: Any = lambda n: None) -> TaskScores:
        for _ in range(3):
            advance(8)
        return TaskScores({}, [])


def test_a_task_is_one_batch_of_an_evaluation_and_may_take_longer_than_one(told: list[int]) -> None:
    tasks: Any = [Task()]
    model: Any = torch.nn.Module()
    model.model = torch.nn.Module()
    TaskEvaluation(tasks, torch.device("cpu"), sharded=False).evaluate(model, 0)
    assert len(told) == 3


def test_a_save_that_training_waits_for(told: list[int], tmp_path: Path) -> None:
    write_full(tmp_path / "ep0-ba1", {"weights": [torch.zeros(1000) for _ in range(5)]})
    assert len(told) > 5


@pytest.mark.parametrize("writes", [True, False])
def test_a_save_in_flight_that_training_waits_for(
    told: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    """It is the main thread that says so, when it waits; and only while bytes are written."""
    monkeypatch.setattr(save_job, "_TURN", 0.05)

    class Job:
        def run(self, folder: Any, group: Any) -> None:
            with HashedFile(tmp_path / "file") as file:
                for _ in range(4):
                    time.sleep(0.1)
                    if writes:
                        file.write(b"weights")

    job: Any = Job()
    folder: Any = None
    save = SaveThread(job, folder, None)
    time.sleep(0.15)
    assert told == []
    save.wait()
    assert save.done
    assert (len(told) > 0) == writes
