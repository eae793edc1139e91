"""What a certificate must not be granted for; the runs are made up."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.certify import segment
from llmtrain.certify.command import certify_command
from llmtrain.certify.plan import Point
from llmtrain.certify.segment import Segment, Starter, Timing
from llmtrain.certify.subject import Subject
from llmtrain.certify.trial import Failed, Options, Trial
from llmtrain.errors import UserError


def row(step: int, samples: list[list[list[int]]]) -> dict[str, Any]:
    """Of the step record."""
    loss = {"loss/train/total": (1.0 / step).hex()}
    return {"step": step, "epoch": 0, "samples": samples, "loss": loss, "lr": ["0x1p-10"], "rng": ["a"] * len(samples)}


def rows(first: int, last: int, ranks: int = 2) -> list[dict[str, Any]]:
    """Four samples in each global batch, dealt out to the ranks."""
    return [
        row(step, [[[4 * step + n] for n in range(4) if n % ranks == rank] for rank in range(ranks)])
        for step in range(first, last + 1)
    ]


class Runs:
    """Gives one segment after the other for starts of a run."""

    def __init__(self, *segments: Segment) -> None:
        self.segments = list(segments)

    def start(self, ranks: int, choose: Callable[..., Any], overrides: Sequence[str] = ()) -> Segment:
        return self.segments.pop(0)


def trial(monkeypatch: pytest.MonkeyPatch, runs: Runs, **options: Any) -> Trial:
    data = {"eval_loader": None, "device_eval_batch_size": 2, "device_train_microbatch_size": 2, "model": {}}
    what = Subject("x", data, (), 8, (), None, False)
    place: Any = None
    made = Trial(what, Options(**options), place, lambda *_: None)
    monkeypatch.setattr(made, "_starter", lambda name, data: runs)
    return made


def ended(began: int, made: list[dict[str, Any]], ranks: int = 2) -> Segment:
    return Segment(ranks, began, made, None, (0,) * ranks, "")


def test_batches_that_do_not_say_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lists of nothing are equal."""
    silent = [{**one, "samples": [[], []]} for one in rows(1, 8)]
    with pytest.raises(UserError, match="do not say which samples"):
        trial(monkeypatch, Runs(ended(0, silent))).undisturbed("whole", {})


def test_a_number_of_ranks_that_has_trained_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {int(one["step"]): one for one in rows(1, 8)}
    runs = Runs(ended(0, rows(1, 8)), ended(8, [], ranks=1))  # the first was over before it could be killed
    made = trial(monkeypatch, runs, other_ranks=(1,))
    with pytest.raises(Failed):
        made.elastic(whole)
    assert not made.certificate.granted
    assert "no step was trained on 1 rank" in str(made.certificate.problem)


class Crashed:
    """Ranks that failed by themselves just before they were to be killed."""

    alive = False
    codes = (1, 1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def send(self, signum: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        pass

    def kill(self) -> None:
        pass


def test_a_crash_does_not_pass_for_a_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(segment, "Ranks", Crashed)
    starter = Starter(tmp_path / "x.yaml", tmp_path / "run", tmp_path, {}, tmp_path, Timing())
    point = Point("start", after=0, moment=0.0, stage="begun", rank=None)
    made = starter.start(2, lambda began, ranks: point)
    assert made.kill is None
    assert made.failed


def test_nothing_tried_is_nothing_proved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing would be proved"):
        certify_command(tmp_path / "x.yaml", [], kills=0, other_ranks="none")
