"""RUN/skipped_steps.json, and the checkpoints that a rewind leaves behind. A kill may come between any two actions."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import Best, read_best, write_best
from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.errors import UserError
from llmtrain.training import skipped_steps
from llmtrain.training.skipped_steps import SET_ASIDE, SKIPPED_STEPS, RewindRecord


def record(step: int, **changes: Any) -> RewindRecord:
    values = {
        "reason": "loss 9, median 2",
        "first": step + 2,
        "last": step + 4,
        "found_at": step + 3,
        "checkpoint": f"ep0-ba{step}",
        "step": step,
        "when": "2026-01-01T00:00:00+00:00",
    }
    return RewindRecord.model_validate({**values, **changes})


def a_run(path: Path, steps: list[int]) -> Path:
    """A run's folder with checkpoints of some steps."""
    folder = path / "checkpoints"
    for step in steps:
        one = folder / f"ep0-ba{step}"
        one.mkdir(parents=True)
        (one / "data").write_bytes(b"%d" % step)
        entry = {"data": manifest.file_entry(one / "data")}
        manifest.write(one, kind="full", step=step, tokens=step, files=entry, recipe={}, tokenizer_fingerprint=None)
    (folder / "latest").symlink_to(f"ep0-ba{steps[-1]}")
    return path


def names(run: Path) -> list[str]:
    return [info.path.name for info in checkpoints_in(run / "checkpoints")]


def test_later_checkpoints_are_set_aside_and_latest_follows(tmp_path: Path) -> None:
    run = a_run(tmp_path, [4, 8, 12])
    checkpoints = run / "checkpoints"
    write_best(checkpoints, Best(checkpoint="ep0-ba12", step=12, monitor="m", dataloader_label="e", value=1), run / "s")
    skipped_steps.add(run, record(4))
    assert skipped_steps.finish(run, checkpoints) == ["ep0-ba12", "ep0-ba8"]
    assert names(run) == ["ep0-ba4"]
    assert (checkpoints / "latest").readlink() == Path("ep0-ba4")
    assert read_best(checkpoints) is None
    assert not (checkpoints / "best").is_symlink()
    assert sorted(path.name for path in (checkpoints / SET_ASIDE).iterdir()) == ["ep0-ba12", "ep0-ba8"]
    assert skipped_steps.read(run)[0].done
    # Once done, checkpoints of the same names are those of the run that went back.
    a_run(tmp_path / "again", [8])
    shutil.copytree(tmp_path / "again/checkpoints/ep0-ba8", checkpoints / "ep0-ba8")
    assert skipped_steps.finish(run, checkpoints) == []
    assert names(run) == ["ep0-ba8", "ep0-ba4"]


class Killed(BaseException):
    pass


def test_a_kill_at_any_point_leaves_what_the_next_start_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = -1

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "symlink_to", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    kills = 0
    for point in range(100):
        run = a_run(tmp_path / str(point), [4, 8, 12])
        left = point
        try:
            skipped_steps.add(run, record(4))
            skipped_steps.finish(run, run / "checkpoints")
            break
        except Killed:
            kills += 1
        left = -1
        decided = bool(skipped_steps.read(run))
        skipped_steps.finish(run, run / "checkpoints")
        assert (run / "checkpoints/latest").exists()
        assert names(run) == (["ep0-ba4"] if decided else ["ep0-ba12", "ep0-ba8", "ep0-ba4"])
    assert kills > 10


def test_the_next_rewind_takes_the_place_of_what_the_last_one_set_aside(tmp_path: Path) -> None:
    run = a_run(tmp_path, [4, 8])
    for step, kept in ((4, ["ep0-ba8"]), (2, ["ep0-ba4"])):
        (run / "checkpoints" / f"ep0-ba{step}").mkdir(exist_ok=True)
        skipped_steps.add(run, record(step))
        skipped_steps.finish(run, run / "checkpoints")
        assert sorted(path.name for path in (run / "checkpoints" / SET_ASIDE).iterdir()) == kept
    assert [rewind.step for rewind in skipped_steps.read(run)] == [4, 2]


def test_nothing_is_set_aside_where_the_checkpoint_to_go_back_to_is_gone(tmp_path: Path) -> None:
    run = a_run(tmp_path, [4, 8])
    skipped_steps.add(run, record(4))
    shutil.rmtree(run / "checkpoints/ep0-ba4")
    with pytest.raises(UserError, match="ep0-ba4, which is not there"):
        skipped_steps.finish(run, run / "checkpoints")
    assert names(run) == ["ep0-ba8"]


def test_steps_that_are_left_out() -> None:
    rewinds = [record(4), record(8)]  # 6-8 and 10-12
    assert [step for step in range(1, 20) if skipped_steps.is_left_out(rewinds, step)] == [6, 7, 8, 10, 11, 12]


def test_a_file_that_cannot_be_read_is_named_and_a_new_run_does_not_care(tmp_path: Path) -> None:
    (tmp_path / SKIPPED_STEPS).write_text('{"rewinds": [{"first": 1}]}')
    with pytest.raises(UserError, match=r"skipped_steps\.json cannot be read"):
        skipped_steps.of_run(tmp_path, anew=False)
    assert skipped_steps.of_run(tmp_path, anew=True) == []
    skipped_steps.add(tmp_path, record(4))
    assert json.loads((tmp_path / SKIPPED_STEPS).read_text())["rewinds"][0]["first"] == 6
