"""The benchmark of the training step: what it computes from its figures, and a small run of it."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"
ARGS = Namespace(warmup=1, clock="cpu")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("step")


def model(seconds: list[float], peak: int, loss: float, device: str = "CPU") -> dict[str, Any]:
    steps = [{"cpu": s, "wall": 2 * s, "peak_bytes": peak, "loss": loss} for s in [9.0, *seconds]]
    return {"steps": steps, "device": device}


def test_ratios_are_medians_over_the_rounds(step: ModuleType) -> None:
    case = step.Case.parse("tiny:fp32:512x2")
    ours, theirs = model([1.0, 2.0, 1.5], 100, 7.0), model([2.0, 10.0, 5.0], 400, 7.0001)
    found = step.summary(case, {"llmtrain": ours, "transformers": theirs}, ARGS, "cpu")
    assert not found["losses_apart"]
    assert (ours["time_ratio"], theirs["time_ratio"]) == (1.0, 0.3)  # of 0.5, 0.2 and 0.3
    assert theirs["memory_ratio"] == 0.25
    assert ours["tokens_per_second"] == 2 * 512 / 1.5
    assert ours["mfu"] is None


def test_models_that_do_not_compute_the_same_are_found(step: ModuleType) -> None:
    pair = {"llmtrain": model([1.0], 1, 7.0), "transformers": model([1.0], 1, 7.001)}
    assert step.summary(step.Case.parse("tiny:fp32:512"), pair, ARGS, "cpu")["losses_apart"]
    pair["transformers"]["steps"][0]["loss"] = float("nan")
    assert step.summary(step.Case.parse("tiny:fp32:512"), pair, ARGS, "cpu")["losses_apart"]


def test_mfu_is_the_formula_and_withheld_where_the_peak_is_not_known(step: ModuleType) -> None:
    case = step.Case.parse("7b:bf16:2048x4")
    found = {"llmtrain": model([0.5], 1, 7.0, "NVIDIA H200"), "other": model([0.5], 1, 7.0, "NVIDIA Z1")}
    step.summary(case, found, ARGS, "cuda")
    matrices = 12 * 4096**2 * 32 + 50432 * 4096
    flops = 3 * (2 * matrices + 32 * 4 * 2048 * 4096)  # forward and twice that; attention counted as the whole square
    assert found["llmtrain"]["tokens_per_second"] == 4 * 2048 / 1.0  # the clock on the wall
    assert found["llmtrain"]["mfu"] == pytest.approx(8192 * flops / 989.5e12)
    assert found["other"]["mfu"] is None


def test_a_model_that_fails_stands_in_the_table(step: ModuleType) -> None:
    found = {"llmtrain": model([1.0], 10**9, 7.0), "transformers": {"failed": "out of memory", "steps": []}}
    summary = step.summary(step.Case.parse("long:fp32:16384"), found, ARGS, "cpu")
    console = Console(width=120, record=True)
    step.show(console, {"clock": "cpu", "settings": {"rounds": 1}, "cases": {"long:fp32:16384": summary}})
    assert "out of memory" in console.export_text()


@pytest.mark.parametrize("text", ["tiny:fp32", "huge:fp32:5", "tiny:fp8:5", "tiny:fp32:x"])
def test_a_case_that_is_none_is_refused(step: ModuleType, text: str) -> None:
    with pytest.raises(SystemExit, match="SHAPE:PRECISION:LENGTH"):
        step.Case.parse(text)


def test_models_by_name(step: ModuleType) -> None:
    assert step.Model.parse("llmtrain:flex+compile+selective") == ("llmtrain", "flex", True, "selective")
    assert step.Model.parse("llm-foundry") == ("llm-foundry", "auto", False, None)
    for text in ("foundry", "llmtrain+fast"):
        with pytest.raises(SystemExit, match="is not llmtrain, transformers or llm-foundry"):
            step.Model.parse(text)


@pytest.mark.slow
@pytest.mark.long
def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "step"
    models = ["llmtrain", "transformers"]
    command = [sys.executable, "step.py", "--cases", "tiny:fp32:200", "--models", *models, "--rounds", "1"]
    command += ["--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.with_suffix(".json").read_text())["cases"]["tiny:fp32:200"]
    assert list(found["models"]) == models
    assert found["loss_difference"] < 2e-4
    for one in found["models"].values():
        assert one["peak_bytes"] > 16 * one["parameters"] == 16 * 4_196_608
    assert found["models"]["llmtrain"]["kept"] == 1.0
    assert out.with_suffix(".png").stat().st_size > 5000
