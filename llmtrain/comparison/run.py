"""What one run has left in its folder so far: `recipe.yaml`, `metrics.jsonl`, `eval/*.json`."""

import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

TRAIN = "train"
"""Name of the training loss among the curves."""
_TRAIN_KEYS = ("loss/train/total", "metrics/train/LanguageCrossEntropy")
_LOSS = "/LanguageCrossEntropy"
_SPEED = "throughput/tokens_per_sec"
_BATCHES = "throughput/batches_per_sec"


class Point(NamedTuple):
    """A value on the way."""

    step: int
    tokens: int | None
    """Trained before it; None where the run did not count."""
    value: float


@dataclass
class Run:
    """One run; what is missing is empty or None, and said in `notes`."""

    name: str
    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[Point]] = field(default_factory=dict)
    """`train`, and each evaluation's cross-entropy by its label, over the run."""
    scores: dict[str, list[Point]] = field(default_factory=dict)
    """Every other metric of evaluations during training, by its name."""
    tokens_per_second: float | None = None
    """Median over the steps."""
    step_seconds: float | None = None
    """The same."""
    steps: int = 0
    tokens: int | None = None
    parameters: int | None = None
    evaluations: dict[str, float] = field(default_factory=dict)
    """Results of `llmtrain eval` on this run's checkpoints, by a name with checkpoint, data and metric."""
    notes: list[str] = field(default_factory=list)
    diverged: dict[str, int] = field(default_factory=dict)
    """Loss -> step from which it was no finite number any more, to the end; its points stop before."""

    def at(self, curve: str, step: int) -> float | None:
        """The newest value of a loss at or before a step."""
        points = self.losses.get(curve, [])
        place = bisect_right([point.step for point in points], step)
        return points[place - 1].value if place else None


def read_run(path: Path) -> Run:
    """Read a run's folder; the run may still be going on.

    Args:
        path: `runs/NAME`, or its `metrics.jsonl`.

    Raises:
        UserError: there is no such folder, or nothing of a run in it.
    """
    path = path.parent if path.name == "metrics.jsonl" else path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Give folders of runs: runs/NAME.")
    run = Run(path.resolve().name, path)
    found = [_read_recipe(run), _read_metrics(run), _read_evaluations(run)]
    if not any(found):
        raise UserError(f"{path}: no run (it has neither recipe.yaml nor metrics.jsonl nor eval/*.json).")
    if not found[1]:
        run.notes.append("no metrics.jsonl yet")
    elif not run.losses.get(TRAIN):
        run.notes.append("no training loss yet")
    if not found[0]:
        run.notes.append("no recipe.yaml")
    return run


def _read_recipe(run: Run) -> bool:
    from llmtrain.config.safe_yaml import YAMLMistake, read_yaml

    file = run.path / "recipe.yaml"
    if not file.is_file():
        return False
    try:
        content = read_yaml(file)
    except YAMLMistake as error:
        run.notes.append(f"recipe.yaml cannot be read ({error})")
        return True
    run.recipe = content if isinstance(content, dict) else {}
    run.parameters = _parameters(run.recipe.get("model"))
    return True


def _parameters(model: Any) -> int | None:
    from pydantic import ValidationError

    from llmtrain.model.config import MPTConfig
    from llmtrain.model.flops import n_params

    try:
        return n_params(MPTConfig.model_validate(model))
    except ValidationError:  # a model of transformers, or of another version
        return None


def _read_metrics(run: Run) -> bool:
    file = run.path / "metrics.jsonl"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # half a line: the run is writing, or was killed
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            # A step that a resumed run repeated counts as it was repeated.
            rows.setdefault(row["step"], {}).update(row)
    tokens: int | None = None
    speeds: list[float] = []
    rates: list[float] = []
    for step, row in sorted(rows.items()):
        tokens = row.get("time/token", tokens)
        run.steps = max(run.steps, step)
        train = next((row[key] for key in _TRAIN_KEYS if isinstance(row.get(key), int | float)), None)
        if train is not None:
            _add_loss(run, TRAIN, Point(step, tokens, train))
        for key, value in row.items():
            if not isinstance(value, int | float) or key in _TRAIN_KEYS:
                continue
            if key.startswith("metrics/") and key.endswith(_LOSS):
                _add_loss(run, key.removeprefix("metrics/").removesuffix(_LOSS), Point(step, tokens, value))
            elif not _is_number(value):
                continue
            elif key.startswith(("metrics/", "icl/")) and not key.startswith("metrics/train/"):
                run.scores.setdefault(key.removeprefix("metrics/"), []).append(Point(step, tokens, value))
        speeds += [row[_SPEED]] if _is_number(row.get(_SPEED)) else []
        rates += [row[_BATCHES]] if _is_number(row.get(_BATCHES)) and row[_BATCHES] > 0 else []
    run.notes += [
        f"{label}: the loss is no finite number from step {step:,} on" for label, step in run.diverged.items()
    ]
    run.tokens = tokens
    run.tokens_per_second = statistics.median(speeds) if speeds else None
    run.step_seconds = 1 / statistics.median(rates) if rates else None
    return True


def _add_loss(run: Run, label: str, point: Point) -> None:
    if _is_number(point.value):
        run.losses.setdefault(label, []).append(point)
        run.diverged.pop(label, None)  # a step that was skipped: it has come back
    else:
        run.diverged.setdefault(label, point.step)


def _read_evaluations(run: Run) -> bool:
    files = sorted((run.path / "eval").glob("*.json"))
    for file in files:
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            run.notes.append(f"eval/{file.name} cannot be read")
            continue
        models = content.get("models") if isinstance(content, Mapping) else None
        if not isinstance(models, list):
            models = [content]
        for one in models:
            if isinstance(one, Mapping):
                several = f" {Path(str(one.get('source'))).name}" if len(models) > 1 else ""
                _add_evaluation(run, file.stem + several, one)
    return bool(files)


def _add_evaluation(run: Run, stem: str, content: Mapping[str, Any]) -> None:
    """The numbers of one model in a file of `llmtrain eval`."""
    for one in content.get("lengths") or []:
        if isinstance(one, Mapping):
            data = f"{one.get('label') or 'loss'} at {one.get('max_seq_len', '?')}"
            for metric in ("loss", "perplexity", "bits_per_byte"):
                _add(run, f"{stem}: {data}, {metric}", one.get(metric))
    for row in content.get("tasks") or []:
        if isinstance(row, Mapping):
            shots = row.get("num_fewshot")
            task = row.get("task") if shots is None else f"{row.get('task')}/{shots}-shot"
            _add(run, f"{stem}: {task}, {row.get('metric')}", row.get("value"))
    averages = content.get("averages")
    for name, value in averages.items() if isinstance(averages, Mapping) else ():
        _add(run, f"{stem}: average {name}", value)


def _add(run: Run, name: str, value: Any) -> None:
    if _is_number(value):
        run.evaluations[name] = float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
