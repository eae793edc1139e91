"""The benchmark of data preparation: what it computes, and a run at a tiny size without peers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def runs(*cpu: float) -> list[dict[str, float]]:
    return [{"cpu": c, "wall": 2 * c, "peak_mb": 50.0, "peak_of_one_mb": 40.0} for c in cpu]


def test_ratios_are_medians_over_the_rounds(load) -> None:
    names = ("llmtrain, 1 proc.", "llm-foundry json")
    sizes = {}
    for mb, ours, theirs in ((10, (1.0, 2.0, 1.0), (20.0, 30.0, 50.0)), (110, (6.0,) * 3, (200.0,) * 3)):
        both = dict(zip(names, (runs(*ours), runs(*theirs)), strict=True))
        same = dict.fromkeys(names, True)
        sizes[str(mb)] = {"megabytes": mb, "tokens": 100, "runs": both, "core_cpu": [0.5] * 3, "same_ids": same}
    result = load("prep").summary({"sizes": sizes})
    assert sizes["10"]["times_faster"]["llm-foundry json / llmtrain, 1 proc."]["cpu"] == 20  # of 20, 15 and 50
    assert sizes["10"]["summary"]["llmtrain, 1 proc."]["mb_per_cpu"] == 10
    assert result["growth"]["llmtrain, 1 proc."]["cpu_per_mb"] == pytest.approx(0.05)
    assert result["growth"]["llmtrain, 1 proc."]["peak_mb_per_mb"] == 0
    text = load("prep_report").markdown(result)
    assert "| 10 | llmtrain, 1 proc. | llm-foundry json | 20.0 | 20.0 | 1.0 |" in text


def test_different_tokens_are_found(load) -> None:
    check = load("prep_check")
    one = np.arange(100, dtype=np.uint32)
    assert check.same_beginning(one, one[:95], 10)
    assert not check.same_beginning(one, one[:80], 10)
    assert not check.same_beginning(one, one[::-1], 10)
    assert check.same_tokens(one, one[5:][::-1], 10)
    assert not check.same_tokens(one, np.where(one < 20, 0, one).astype(np.uint32), 10)


def test_processes_that_a_command_leaves_behind_are_counted(load, tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    found = load("prep_process").run([sys.executable, "-c", outer], {}, tmp_path / "log")
    assert found.cpu > 0.4


def test_a_command_that_fails_is_no_figure(load, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        load("prep_process").run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], {}, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "why\n"


@pytest.mark.slow
@pytest.mark.long
def test_a_tiny_run(tmp_path: Path) -> None:
    out = tmp_path / "prep"
    command = [sys.executable, str(FOLDER / "prep.py"), "--sizes", "0.3:1", "0.6:1", "--vocab-size", "600"]
    command += ["--no-debian", "--work", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.with_suffix(".json").read_text())
    for size in ("0.3", "0.6"):
        one = found["sizes"][size]
        assert set(one["runs"]) == {"llmtrain, 1 proc.", "llmtrain, 2 proc."}
        assert all(one["same_ids"].values())
        assert one["summary"]["llmtrain, 1 proc."]["peak_mb"] > 20
    assert "core" in found["growth"]
    assert out.with_suffix(".md").read_text().startswith("| MB | contender |")
    assert out.with_suffix(".png").stat().st_size > 5000
