"""jsonl files of a run whose rows say at which step they were made: samples, answers of evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_rows(file: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the rows of one step, and keep the others."""
    earlier = [row for row in _read(file) if row["step"] != step] if file.exists() else []
    _write(file, [*earlier, *rows])


def forget_later_rows(file: Path, step: int) -> None:
    """Drop what a run that resumes at `step` will make again; all of it at the start of a run."""
    if file.exists():
        _write(file, [row for row in _read(file) if 0 < step >= row["step"]])


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)


def _read(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that a crash cut off
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
