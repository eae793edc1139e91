"""The table of faults: how it is made, and that the one in the docs has every kind of fault."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtrain.testing.faults import FAULT_TIMES, KINDS, LIMIT, kind_of, observe

FOLDER = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("faults")


def measured(fault: str, **changes: Any) -> dict[str, Any]:
    times = {"detected": 1.26, "recovered": None, "date": "2026-01-02", "load": 3.0}
    return {"fault": fault, "outcome": "ends", "message": "error (rank 1, after step 6): gone", **times, **changes}


def test_rows_are_in_the_order_of_the_kinds(faults: ModuleType) -> None:
    rows = [
        measured("loss spike", recovered=4.0),
        measured("rank stopped for 7 s", load=9.0),
        measured("rank killed | twice", message=f"error in {FOLDER}/train/shard `a`\nmore"),
    ]
    text = faults.table(rows)
    lines = text.splitlines()
    assert lines[0].startswith("3 faults, each of them named (or got over) within 60 s, measured on 2026-01-02 ")
    assert "the load was 3 to 9, 3 in the middle" in lines[0]
    assert lines[4] == "| rank killed \\| twice | ends | 1.3 s |  | `error in shard 'a'` |"
    assert lines[5].startswith("| rank stopped")
    assert lines[6] == "| loss spike | ends | 1.3 s | 4.0 s | `error (rank 1, after step 6): gone` |"
    assert "rank killed" not in faults.missing(row["fault"] for row in rows)
    assert "clock jump" in faults.missing(row["fault"] for row in rows)


def test_a_page_without_a_place_for_the_table(faults: ModuleType) -> None:
    page = f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter"
    assert faults.with_table(page, "new") == f"before\n{faults.BEGIN}\nnew\n{faults.END}\nafter"
    with pytest.raises(SystemExit, match="markers"):
        faults.with_table(page.replace(faults.END, ""), "new")


def test_the_docs_have_every_kind_of_fault_or_say_which_not_and_none_took_longer(faults: ModuleType) -> None:
    lines = faults.PAGE.read_text().partition(faults.BEGIN)[2].partition(faults.END)[0].splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    lacking = [line for line in lines if line.startswith(faults.NOT_MEASURED)]
    missing = faults.missing(row[0].removeprefix("| ") for row in rows)
    assert lacking == ([f"{faults.NOT_MEASURED} {', '.join(missing)}."] if missing else [])
    assert all(float(row[2].removesuffix(" s")) <= LIMIT for row in rows)


def test_what_took_too_long_or_left_damage_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULT_TIMES, raising=False)
    fine: dict[str, Any] = {"run": tmp_path, "detected": 1.0, "recovered": 2.0, "message": "x"}
    observe("loss spike", "goes on", **fine)
    with pytest.raises(AssertionError, match="named after 61"):
        observe("loss spike", "goes on", **{**fine, "detected": 61.0})
    with pytest.raises(AssertionError, match="recovered from after 61"):
        observe("loss spike", "goes on", **{**fine, "recovered": 61.0})
    with pytest.raises(AssertionError, match="no message"):
        observe("loss spike", "goes on", **{**fine, "message": " "})
    with pytest.raises(ValueError, match="begins with none"):
        observe("power cut", "goes on", **fine)
    assert [kind_of(kind) for kind in KINDS] == list(range(len(KINDS)))
    (tmp_path / "checkpoints/ep0-ba5").mkdir(parents=True)
    (tmp_path / "checkpoints/latest").symlink_to("ep0-ba5")
    with pytest.raises(AssertionError, match="`latest` is damaged"):
        observe("loss spike", "goes on", **fine)
