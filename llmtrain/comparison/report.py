"""Runs side by side, as tables for the terminal and as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.comparison.differences import MISSING, differences
from llmtrain.comparison.run import TRAIN, Point, Run
from llmtrain.training.loss_curve import Smoothed

LONGEST_VALUE = 40
"""Characters of a recipe's value in a table; the JSON has all."""


@dataclass(frozen=True)
class Line:
    """A row of a table: a value for each run, None where it has none."""

    name: str
    values: list[float | None]
    best: Callable[[list[float]], float] | None = None
    """Which of them is good: min, max, or None where that is not known."""


@dataclass(frozen=True)
class Comparison:
    """All that is shown."""

    runs: list[Run]
    common: tuple[str, int] | None
    """("tokens" or "step", how many): as far as every run with losses has come."""
    losses: list[Line]
    scores: list[Line]
    evaluations: list[Line]
    recipe: dict[str, list[Any]]


def compare(runs: Sequence[Run]) -> Comparison:
    """What there is to say about runs; those that lack something have None there."""
    common = _common(runs)
    losses = []
    for label in _labels([run.losses for run in runs]):
        curves = [smooth(points) if label == TRAIN else points for points in (r.losses.get(label, []) for r in runs)]
        name = "train, smoothed" if label == TRAIN else label
        # Of a run that has diverged the last finite loss is none that it has.
        held = [[] if label in run.diverged else points for run, points in zip(runs, curves, strict=True)]
        losses.append(Line(f"{name}: last", [_last(points) for points in held], min))
        losses.append(Line(f"{name}: best", [min((p.value for p in c), default=None) for c in curves], min))
        if common is not None and len(runs) > 1:
            at = (
                f"{name}: at {_amount(common[1])} {common[0]}"
                if common[0] == "tokens"
                else f"{name}: at step {common[1]}"
            )
            losses.append(Line(at, [_until(points, *common) for points in held], min))
    scores = []
    for label in _labels([run.scores for run in runs]):
        values = [_last(run.scores.get(label, [])) for run in runs]
        scores.append(Line(f"{label}: last", values, _good(label)))
    names = _labels([run.evaluations for run in runs])
    evaluations = [Line(name, [run.evaluations.get(name) for run in runs], _good(name)) for name in names]
    recipes = [run.recipe for run in runs]
    return Comparison(
        list(runs), common, losses, scores, evaluations, differences(recipes) if len(runs) > 1 and all(recipes) else {}
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average with bias correction."""
    average = Smoothed()
    return [point._replace(value=average.next(point.value)) for point in points]


def show(console: Console, found: Comparison) -> None:
    """Print the tables."""
    runs = found.runs
    table = _table("runs", runs)
    facts: list[tuple[str, Callable[[Run], Any]]] = [
        ("parameters", lambda run: _amount(run.parameters)),
        ("steps", lambda run: f"{run.steps:,}"),
        ("tokens", lambda run: _amount(run.tokens)),
        ("tokens/s", lambda run: _amount(run.tokens_per_second)),
        ("seconds a step", lambda run: MISSING if run.step_seconds is None else f"{run.step_seconds:.3g}"),
    ]
    for name, value in facts:
        table.add_row(name, *(value(run) for run in runs))
    if any(run.notes for run in runs):
        table.add_row("note", *("; ".join(run.notes) for run in runs))
    console.print(table)
    for title, lines in (
        ("losses (nats a token)", found.losses),
        ("metrics during training", found.scores),
        ("evaluations (eval/*.json)", found.evaluations),
    ):
        if lines:
            table = _table(title, runs)
            for line in lines:
                table.add_row(line.name, *_cells(line))
            console.print(table)
    if found.recipe:
        table = _table("recipe, where it differs", runs)
        telling = {key: values for key, values in found.recipe.items() if _says_something(values)}
        for key, values in telling.items():
            table.add_row(Text(key), *(Text(_short(value)) for value in values))
        console.print(table)
        if left := len(found.recipe) - len(telling):
            console.print(f"And {left} empty keys of blocks that other recipes do not have (--output: in the JSON).")
    elif len(runs) > 1:
        whole = all(run.recipe for run in runs)
        console.print("The recipes are the same." if whole else "Not every run has a recipe.yaml to compare.")


def as_json(found: Comparison) -> dict[str, Any]:
    """The same for programs; curves are left out."""

    def table(lines: Sequence[Line]) -> dict[str, dict[str, float | None]]:
        names = [run.name for run in found.runs]
        return {line.name: dict(zip(names, line.values, strict=True)) for line in lines}

    return {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "parameters": run.parameters,
                "steps": run.steps,
                "tokens": run.tokens,
                "tokens_per_second": run.tokens_per_second,
                "step_seconds": run.step_seconds,
                "notes": run.notes,
            }
            for run in found.runs
        ],
        "common": None if found.common is None else {found.common[0]: found.common[1]},
        "losses": table(found.losses),
        "metrics": table(found.scores),
        "evaluations": table(found.evaluations),
        "recipe": {
            key: {run.name: value for run, value in zip(found.runs, values, strict=True)}
            for key, values in found.recipe.items()
        },
    }


def _table(title: str, runs: Sequence[Run]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    return table


def _cells(line: Line) -> list[Text]:
    there = [value for value in line.values if value is not None]
    best = line.best(there) if line.best is not None and len(there) > 1 and len(set(there)) > 1 else None
    cells = []
    for value in line.values:
        text = MISSING if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
        cells.append(Text(text, style="bold green" if value is not None and value == best else ""))
    return cells


def _common(runs: Sequence[Run]) -> tuple[str, int] | None:
    """How far all runs with losses have come, in tokens where all count them."""
    with_losses = [run for run in runs if run.losses]
    if not with_losses:
        return None
    tokens = [run.tokens for run in with_losses]
    counted = [n for n in tokens if n]
    if len(counted) == len(tokens):
        return "tokens", min(counted)
    return "step", min(run.steps for run in with_losses)


def _until(points: Sequence[Point], unit: str, most: int) -> float | None:
    """The newest value that is not beyond so many tokens or steps."""
    before = [p.value for p in points if (p.step if unit == "step" else p.tokens or 0) <= most]
    return before[-1] if before else None


def _last(points: Sequence[Point]) -> float | None:
    return points[-1].value if points else None


def _good(name: str) -> Callable[[list[float]], float] | None:
    """Which values of a metric are better, by its name."""
    low = name.lower()
    if any(word in low for word in ("loss", "crossentropy", "perplexity", "bits_per_byte", "bits-per-byte", "ppl")):
        return min
    if any(word in low for word in ("acc", "average", "exact", "f1", "incontextlearning", "em,", "gauntlet", "mc1")):
        return max
    return None


def _labels(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """All names, in the order in which they come; the training loss first."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    return sorted(names, key=lambda name: name != TRAIN)


def _amount(value: float | None) -> str:
    if value is None:
        return MISSING
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f}{suffix}"
    return f"{value:,.0f}"


def _says_something(values: Sequence[Any]) -> bool:
    """Not so where a recipe has no such block, and in the others the key is off or empty."""
    return MISSING not in values or any(value not in (MISSING, None, False, "", [], {}) for value in values)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"...{text[-LONGEST_VALUE + 3 :]}"
