"""Progress says how much is done, how fast, and how long it will take; in a log not too often."""

import io

import pytest
from rich.console import Console

from llmtrain import progress as module
from llmtrain.progress import progress


def test_lines_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with progress(Console(file=out, width=200), "tokenizing", 40_000_000, "bytes") as advance:
        for _ in range(20):
            now += 1
            advance(1_000_000)
    lines = out.getvalue().splitlines()
    assert lines[0] == "tokenizing: 5.0 of 40.0 MB, 1.00 MB/s, 35 s left"
    assert len(lines) == 4


@pytest.mark.parametrize(("total", "of"), [(None, "7,000 tokens"), (9_000, "7,000 of 9,000 tokens")])
def test_other_units_and_unknown_totals(monkeypatch: pytest.MonkeyPatch, total: int | None, of: str) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with progress(Console(file=out, width=200), "reading", total, "tokens") as advance:
        now = 7.0
        advance(7_000)
    left = "" if total is None else ", 2 s left"
    assert out.getvalue() == f"reading: {of}, 1,000 tokens/s{left}\n"


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with progress(Console(file=out, width=120, force_terminal=True), "reading", 3_000_000, "bytes") as advance:
        advance(2_000_000)
    assert "reading" in out.getvalue()
    assert "2.0 of 2.0 MB" in out.getvalue()  # the total was an estimate: at the end it is what was done
