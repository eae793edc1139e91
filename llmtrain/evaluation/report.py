"""Results of an evaluation: tables on the console; JSON, text, CSV and a picture on disk."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from llmtrain.evaluation.losses import Measured
from llmtrain.evaluation.results import TaskResult, TaskResults
from llmtrain.evaluation.results_picture import draw_results, short
from llmtrain.redaction import redact

_WIDTH = 160
"""Characters of a line of a table where a console does not say, or has too few."""


@dataclass(frozen=True)
class Evaluated:
    """What was found of one model."""

    about: dict[str, Any]
    """Its facts; `source` is its name."""
    losses: list[Measured] = field(default_factory=list)
    """On each data, at each length."""
    tasks: TaskResults = field(default_factory=TaskResults)
    """Of all engines."""

    @property
    def name(self) -> str:
        """Its column."""
        return str(self.about["source"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: facts, `lengths`, and, where there are any, `tasks`, `averages` and `task_settings`."""
        content = {**self.about, "lengths": [one.as_dict() for one in self.losses]}
        if self.tasks.rows or self.tasks.averages:
            tasks = self.tasks.as_dict()
            content |= {"tasks": tasks["tasks"], "averages": tasks["averages"], "task_settings": tasks["about"]}
        return content


def write_results(stem: Path, content: dict[str, Any], found: Sequence[Evaluated]) -> list[Path]:
    """Write STEM.json, .txt, .csv (losses by position) and .png, each atomically; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = redact(content)
    names = [stem.with_name(stem.name + suffix) for suffix in (".json", ".txt", ".csv", ".png")]
    _replace(names[0], json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    text = io.StringIO()
    print_results(Console(file=text), found)
    _replace(names[1], "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
    if any(one.losses for one in found):
        _replace(names[2], _csv(found))
    else:
        names[2].unlink(missing_ok=True)  # of an earlier evaluation
    draw_results(found, names[3])
    return [name for name in names if name.is_file()]


def _finite(value: Any) -> Any:
    """Infinite perplexities and losses that are no numbers as null: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _csv(found: Sequence[Evaluated]) -> str:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["max_seq_len", "first", "last", "loss", "targets", "model", "data"])
    for one in found:
        for at in one.losses:
            for b in at.losses.curve():
                rows.writerow((at.max_seq_len, b.first, b.last, b.loss, b.targets, one.name, at.label or ""))
    return text.getvalue()


def print_results(console: Console, found: Sequence[Evaluated]) -> None:
    """Tables: losses, those of each source, tasks, averages."""
    wide = Console(file=console.file, width=_WIDTH, force_terminal=console.is_terminal)
    for table in _tables(found):
        # A log has no width of its own; and on a narrow terminal long lines are better than columns without figures.
        fits = console.is_terminal and wide.measure(table).maximum <= console.width
        (console if fits else wide).print(table)


def _tables(found: Sequence[Evaluated]) -> Iterator[RenderableType]:
    if any(one.losses for one in found):
        yield _losses_table(found)
    for one in found:
        if any(at.by_source for at in one.losses):
            yield _sources_table(one, with_name=len(found) > 1)
    if any(one.tasks.rows for one in found):
        yield _tasks_table(found)
    if any(one.tasks.averages for one in found):
        yield _averages_table(found)


def _table(*columns: str) -> Table:
    """Text on the left; all columns behind the first are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        if column in ("model", "data", "source", "task", "metric", "average") or not number:
            table.add_column(column, overflow="fold", min_width=12)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _losses_table(found: Sequence[Evaluated]) -> Table:
    """One line a model, data and length."""
    all_of_them = [(one, at) for one in found for at in one.losses]
    columns: list[tuple[str, Callable[[Evaluated, Measured], str]]] = []
    if len(found) > 1:
        columns.append(("model", lambda one, at: one.name))
    if any(at.label is not None for _, at in all_of_them):
        columns.append(("data", lambda one, at: at.label or ""))
    columns += [
        ("max_seq_len", lambda one, at: f"{at.max_seq_len:,}"),
        ("loss", lambda one, at: f"{at.losses.loss:.4f}"),
        ("perplexity", lambda one, at: f"{at.as_dict()['perplexity']:,.2f}"),
    ]
    if any(at.n_bytes is not None for _, at in all_of_them):
        columns.append(("bits/byte", lambda one, at: "-" if at.bits_per_byte is None else f"{at.bits_per_byte:.4f}"))
    columns += [
        ("last eighth", lambda one, at: _at_the_end(at)),
        ("targets", lambda one, at: f"{at.losses.targets:,}"),
        ("tokens/s", lambda one, at: f"{at.losses.targets / max(at.seconds, 1e-9):,.0f}"),
    ]
    table = _table(*(name for name, _ in columns))
    for one, at in all_of_them:
        table.add_row(*(cell(one, at) for _, cell in columns))
    return table


def _sources_table(one: Evaluated, *, with_name: bool) -> Table:
    """Loss of each source, one line a source and one column a length."""
    measured = [at for at in one.losses if at.by_source]
    heads = [f"loss{f' of {at.label}' if at.label else ''} at {at.max_seq_len:,}" for at in measured]
    table = _table(f"source, {one.name}" if with_name else "source", *heads, "targets")
    for name in dict.fromkeys(name for at in measured for name in at.by_source):
        each = [at.by_source.get(name) for at in measured]
        losses = [f"{source.loss:.4f}" if source is not None else "-" for source in each]
        table.add_row(name, *losses, f"{max(source.targets for source in each if source is not None):,}")
    return table


def _tasks_table(found: Sequence[Evaluated]) -> Table:
    """One line a task and metric, one column a model; what is expected and what guessing gives beside it."""
    rows = [{_key(row): row for row in one.tasks.rows} for one in found]
    keys = list(dict.fromkeys(key for of_one in rows for key in of_one))
    expected = any(row.expected is not None for of_one in rows for row in of_one.values())
    guessed = any(row.random_baseline is not None for of_one in rows for row in of_one.values())
    heads = ["value"] if len(found) == 1 else [one.name for one in found]
    heads = [head for name in heads for head in ((name, "expected") if expected else (name,))]
    table = _table("task", "shots", "metric", *heads, *(["by chance"] if guessed else []), "samples")
    for key in keys:
        each = [of_one.get(key) for of_one in rows]
        known = next(row for row in each if row is not None)
        cells = []
        for row in each:
            cells.append(_value(row))
            if expected:
                cells.append("" if row is None or row.expected is None else f"{row.expected:.4f}")
        if guessed:
            cells.append("" if known.random_baseline is None else f"{known.random_baseline:.4f}")
        shots = "" if known.num_fewshot is None else str(known.num_fewshot)
        table.add_row(known.task, shots, short(known.metric), *cells, "" if known.n is None else f"{known.n:,}")
    return table


def _averages_table(found: Sequence[Evaluated]) -> Table:
    """The gauntlet: categories and averages, one column a model."""
    table = _table("average", *(["value"] if len(found) == 1 else [one.name for one in found]))
    for name in dict.fromkeys(name for one in found for name in one.tasks.averages):
        values = [one.tasks.averages.get(name) for one in found]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def _key(row: TaskResult) -> tuple[str, int | None, str]:
    return row.task, row.num_fewshot, row.metric


def _value(row: TaskResult | None) -> str:
    if row is None:
        return "-"
    return f"{row.value:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.4f}")


def _at_the_end(at: Measured) -> str:
    """Mean loss of the targets with the most context."""
    from_here = at.max_seq_len * 7 // 8
    sums, counts = at.losses.sums[from_here:].sum(), at.losses.counts[from_here:].sum()
    return f"{float(sums / counts):.4f}" if counts else "-"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
