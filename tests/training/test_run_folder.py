import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.training.loss_curve import TRAIN_LOSS, LossCurve, Smoothed, draw_loss_curve, read_metrics
from llmtrain.training.run_folder import MetricsFile, RunFolder

EVAL = "metrics/eval/LanguageCrossEntropy"


def at(step: int) -> Any:
    return SimpleNamespace(timestamp=SimpleNamespace(batch=step))


def log_run(file: MetricsFile, first: int, last: int, *, evaluate_every: int = 2) -> None:
    """The calls that Composer makes: losses at the number of finished steps, evaluation after the step."""
    for step in range(first, last):
        file.log_metrics({TRAIN_LOSS: 10.0 - step}, step=step)
        file.log_metrics({"lr": 0.1}, step=step + 1)
        file.batch_end(at(step + 1), None)
        if (step + 1) % evaluate_every == 0:
            file.log_metrics({EVAL: 5.0 - step}, step=step + 1)
            file.eval_end(at(step + 1), None)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_resumed_run_logs_each_step_once(folder: RunFolder) -> None:
    whole = RunFolder(folder.path / "whole")
    whole.path.mkdir()
    log_run(MetricsFile(whole), 0, 8)

    log_run(MetricsFile(folder), 0, 7)
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "loss')  # killed while writing
    resumed = MetricsFile(folder)
    resumed.after_load(at(4), None)
    log_run(resumed, 4, 8)

    for key in (TRAIN_LOSS, EVAL, "lr"):
        rows = [[(r["step"], r[key]) for r in read_metrics(f.metrics) if key in r] for f in (whole, folder)]
        assert rows[0] == rows[1]


def test_a_run_from_the_start_drops_the_old_metrics(folder: RunFolder) -> None:
    log_run(MetricsFile(folder), 0, 3)
    MetricsFile(folder).after_load(at(0), None)
    assert folder.metrics.read_text() == ""


def test_values_are_plain_json(folder: RunFolder) -> None:
    import torch

    file = MetricsFile(folder)
    file.log_metrics({"a": torch.tensor(1.5), "b": 2, "c": object}, step=0)
    file.close(at(0), None)
    row = json.loads(folder.metrics.read_text())
    assert (row["a"], row["b"], row["c"]) == (1.5, 2, str(object))


def test_the_picture_shows_training_and_evaluation(folder: RunFolder) -> None:
    log_run(MetricsFile(folder), 0, 20)
    draw_loss_curve(folder.metrics, folder.loss_curve)
    with_evaluation = folder.loss_curve.read_bytes()
    assert with_evaluation.startswith(b"\x89PNG")
    rows = [row for row in read_metrics(folder.metrics) if EVAL not in row]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_loss_curve(folder.metrics, folder.loss_curve)
    assert folder.loss_curve.read_bytes() != with_evaluation


def test_the_picture_of_a_long_run_reads_what_is_new_alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    file, curve = MetricsFile(folder), LossCurve(folder.metrics)
    log_run(file, 0, 20)
    curve.draw(folder.loss_curve)
    read: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr("llmtrain.training.loss_curve.json.loads", lambda line: read.append(line) or loads(line))
    log_run(file, 20, 22, evaluate_every=99)
    curve.draw(folder.loss_curve)
    assert [json.loads(line)["step"] for line in list(read)] == [20, 21, 21, 22]
    at_once = folder.path / "at-once.png"
    draw_loss_curve(folder.metrics, at_once)
    assert at_once.read_bytes() == folder.loss_curve.read_bytes()
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text("".join(lines[:9]))  # a run that went back
    curve.draw(folder.loss_curve)
    draw_loss_curve(folder.metrics, at_once)
    assert at_once.read_bytes() == folder.loss_curve.read_bytes()


def test_pictures_do_not_pile_up_in_memory(folder: RunFolder) -> None:
    log_run(MetricsFile(folder), 0, 20)
    draw_loss_curve(folder.metrics, folder.loss_curve)
    gc.collect()
    before = sum(type(each).__name__ == "Figure" for each in gc.get_objects())
    gc.disable()
    try:
        draw_loss_curve(folder.metrics, folder.loss_curve)
        assert sum(type(each).__name__ == "Figure" for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.loss_curve.mkdir()
    file = MetricsFile(folder)
    log_run(file, 0, 2)
    file.fit_end(at(2), None)
    assert "was not drawn" in capsys.readouterr().err


def test_smoothing_neither_starts_at_zero_nor_leaves_the_range() -> None:
    same, falling = Smoothed(), Smoothed()
    assert [same.next(7.0) for _ in range(5)] == pytest.approx([7.0] * 5)
    values = [falling.next(value) for value in (9.0, 8.0, 7.0, 6.0)]
    assert values[0] == pytest.approx(9.0)
    assert sorted(values, reverse=True) == values
    assert 6.0 < values[-1] < 9.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_ends_no_run_and_loses_no_line(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(folder)
    log_run(file, 0, 2, evaluate_every=9)
    kept = folder.metrics.rename(folder.metrics.with_suffix(".kept"))
    folder.metrics.symlink_to("/dev/full")
    log_run(file, 2, 4, evaluate_every=9)  # no picture: who reads /dev/full gets zeros without end
    assert capsys.readouterr().err.count("No space left on device") == 1
    kept.replace(folder.metrics)
    log_run(file, 4, 6, evaluate_every=9)
    whole = RunFolder(folder.path / "whole")
    whole.path.mkdir()
    log_run(MetricsFile(whole), 0, 6, evaluate_every=9)
    assert folder.metrics.read_text() == whole.metrics.read_text()


def test_evaluations_that_come_fast_do_not_draw_each(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("llmtrain.training.run_folder.time.monotonic", lambda: now[0])
    file = MetricsFile(folder)
    log_run(file, 0, 4)
    assert not folder.loss_curve.exists()
    now[0] += 11
    log_run(file, 4, 6)
    first = folder.loss_curve.stat().st_mtime_ns
    log_run(file, 6, 8)
    assert folder.loss_curve.stat().st_mtime_ns == first
    file.fit_end(at(8), None)
    assert folder.loss_curve.stat().st_mtime_ns > first
