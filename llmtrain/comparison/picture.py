"""Loss curves of several runs in one picture: training on the left, evaluations beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.comparison.report import smooth
from llmtrain.comparison.run import TRAIN, Point, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_EVALUATIONS = 3
"""Panels beside the training loss; the table has all."""
EARLY = 0.03
"""This part of a curve may leave the picture at the top: the fall of the first steps would flatten what follows."""


def draw(runs: Sequence[Run], file: Path) -> bool:
    """Write a PNG, atomically; False where no run has a loss yet."""
    labels = list(dict.fromkeys(label for run in runs for label in run.losses))
    chosen = [label for label in labels if label == TRAIN] + [label for label in labels if label != TRAIN]
    chosen = chosen[: MOST_EVALUATIONS + (TRAIN in labels)]
    if not chosen:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        1, len(chosen), figsize=(max(7.5, 5.2 * len(chosen)), 4.8), layout="constrained", squeeze=False
    )
    in_tokens = all(point.tokens is not None for run in runs for points in run.losses.values() for point in points)
    for axes, label in zip(grid[0], chosen, strict=True):
        _panel(axes, runs, label, in_tokens)
    handles, names = [], []
    for axes in grid[0]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(file)
    return True


def _panel(axes: "Axes", runs: Sequence[Run], label: str, in_tokens: bool) -> None:
    """One loss of all runs; a run has the same colour in all panels."""
    from matplotlib.ticker import EngFormatter

    seen: list[tuple[list[float], list[float]]] = []
    for number, run in enumerate(runs):
        points = run.losses.get(label, [])
        if not points:
            continue
        x = _across(points, in_tokens)
        style: dict[str, Any] = {"color": f"C{number}", "label": run.name, "zorder": 3}
        if label == TRAIN:
            if len(runs) <= 2:
                axes.plot(x, [p.value for p in points], color=f"C{number}", alpha=0.15, linewidth=0.7)
            y = [p.value for p in smooth(points)]
            axes.plot(x, y, linewidth=1.5, **style)
        else:
            y = [p.value for p in points]
            axes.plot(x, y, "o-", markersize=4, linewidth=1.5, **style)
        seen.append((x, y))
    axes.set_title("training loss, smoothed" if label == TRAIN else f"{label}: loss")
    axes.set_xlabel("tokens" if in_tokens else "step")
    axes.set_ylabel("cross-entropy (nats a token)")
    axes.grid(alpha=0.3)
    low = min(min(y) for _, y in seen)
    late = [value for x, y in seen for at, value in zip(x, y, strict=True) if at >= EARLY * x[-1]]
    high = max(late)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    axes.set_xlim(left=-0.015 * max(x[-1] for x, _ in seen))
    if in_tokens:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _across(points: Sequence[Point], in_tokens: bool) -> list[float]:
    return [float(point.tokens or 0) if in_tokens else float(point.step) for point in points]
