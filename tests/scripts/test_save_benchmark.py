"""What the benchmark of saves calls the cost of a save."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "scripts/benchmark"


@pytest.fixture
def save(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("save")


def rows() -> list[dict[str, Any]]:
    """Two steps between saves; steps take 1 s, those beside a save 1.5 s, and one save is waited for."""
    made: list[dict[str, Any]] = []
    for number in range(6):
        way = "beside" if number % 2 == 0 else "waiting"
        stall = {"beside": 0.5, "waiting": 4.0}[way]
        beside = bool(made) and made[-1]["way"] == "beside"
        parts = {"gather": 0.1, "take": 0.3, "stall_cpu": 0.3, "waited": 0.25 if beside else 0.0}
        made += [
            {"step": 2 * number + 1, "seconds": 1.5 if beside else 1.0, "beside_a_save": beside},
            {"step": 2 * number + 2, "seconds": 1.5 if beside else 1.0, "beside_a_save": beside},
        ]
        made[-1] |= {"way": way, "stall": stall, **parts} | ({"copy": 0.2} if way == "beside" else {})
    return made


def test_the_stall_and_what_a_save_costs_in_all(save: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    save.report(rows(), "1 MB", pairs=2)
    lines = capsys.readouterr().out.splitlines()
    stall = next(line for line in lines if "stands still" in line)
    assert stall.split()[-6:] == ["0.500s", "4.000s", "12.5%", "(12.5%", "to", "12.5%)"]
    in_all = next(line for line in lines if "slower steps" in line)
    assert "1.750s" in in_all  # 0.5 in the call, two steps that are 0.5 slower, 0.25 until it was done
    assert "4.000s" in in_all
    assert any("planning" in line and "0.100s" in line for line in lines)
    assert "step with a save in flight:  1.500 s" in lines[-1]
