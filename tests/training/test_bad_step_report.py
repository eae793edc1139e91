"""What is said of a bad step; no training."""

import json
from pathlib import Path

from llmtrain.training.bad_step_report import MicroBatch, Report


def report() -> Report:
    return Report(7, "the loss is not finite", "stopped", [MicroBatch(1, 2, float("nan"), [[3], [4]])], 2)


def test_it_ends_with_where_all_of_it_stands(tmp_path: Path) -> None:
    *_, decision, last = report().lines(report().written(tmp_path))
    assert decision == "stopped"
    assert last == f"the full report: {tmp_path}/bad_steps/step-7.json"
    assert json.loads((tmp_path / "bad_steps/step-7.json").read_text())["micro_batches"][0]["loss"] == "nan"


def test_a_disk_that_takes_no_report_does_not_end_a_run(tmp_path: Path) -> None:
    """And the short version, which stands in the log alone then, says the same as ever."""
    run = tmp_path / "run"
    run.touch()  # no folder can be made in it, whoever asks
    *lines, last = report().lines(report().written(run))
    assert lines == report().lines("")
    assert last == f"the full report was not written: Not a directory: {run}/bad_steps"
