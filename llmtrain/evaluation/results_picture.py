"""The picture of an evaluation: losses by position, and tasks beside what is expected and what guessing gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.evaluation.by_position import Bin
from llmtrain.evaluation.picture import draw_loss_by_position
from llmtrain.evaluation.results import TaskResult

if TYPE_CHECKING:
    from llmtrain.evaluation.report import Evaluated


def draw_results(found: "Sequence[Evaluated]", picture: Path) -> None:
    """Draw one picture of everything.

    Without tasks it is losses by position alone (`draw_loss_by_position`). With tasks they are bars, a colour for each
    model: fractions on the axis, the standard error as a line, a mark where a published value lies, and one where
    guessing does. Metrics that are no fractions stand in the table only.

    Args:
        found: the models.
        picture: PNG to write, atomically.
    """
    curves = _curves(found)
    rows = [{(row.label, row.metric): row for row in one.tasks.rows if _is_fraction(row)} for one in found]
    keys = list(dict.fromkeys(key for of_one in rows for key in of_one))
    title = ", ".join(one.name for one in found)
    if not keys:
        draw_loss_by_position(curves, title, picture)
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = max(3.2, 0.9 + len(keys) * (0.22 + 0.2 * len(found)))
    if curves:
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(14, max(height, 4.5)), width_ratios=(5, 6), layout="constrained"
        )
        _losses(left, curves)
    else:
        figure, right = plt.subplots(figsize=(8, height), layout="constrained")
    _bars(right, keys, rows, [one.name for one in found])
    figure.suptitle(title)
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(picture)


def short(metric: str) -> str:
    """A metric's name without what all of llm-foundry's begin with."""
    return metric.removeprefix("InContextLearning")


def _curves(found: "Sequence[Evaluated]") -> dict[str, list[Bin]]:
    several, labels = len(found) > 1, {at.label for one in found for at in one.losses}
    curves = {}
    for one in found:
        for at in one.losses:
            name = [one.name] if several else []
            name += [at.label] if at.label is not None and len(labels) > 1 else []
            curves[", ".join([*name, f"{at.max_seq_len:,} tokens"])] = at.losses.curve()
    return curves


def _is_fraction(row: TaskResult) -> bool:
    others = [value for value in (row.expected, row.random_baseline) if value is not None]
    return row.higher_is_better and all(0 <= value <= 1 for value in (row.value, *others))


def _losses(axes: Any, curves: Mapping[str, Sequence[Bin]]) -> None:
    for number, (label, bins) in enumerate(curves.items()):
        targets = sum(b.targets for b in bins)
        mean = sum(b.loss * b.targets for b in bins) / max(1, targets)
        middles = [(b.first * b.last) ** 0.5 for b in bins]
        axes.plot(middles, [b.loss for b in bins], ".-", color=f"C{number % 10}", label=f"{label}: {mean:.3f}")
        axes.axhline(mean, color=f"C{number % 10}", alpha=0.5, linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("position (tokens before the target)")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(title="loss over all targets", fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _bars(
    axes: Any,
    keys: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[tuple[str, str], TaskResult]],
    names: Sequence[str],
) -> None:
    from matplotlib.lines import Line2D

    width = 0.8 / len(rows)
    marks: dict[str, Any] = {}
    for number, of_one in enumerate(rows):
        for place, key in enumerate(keys):
            row = of_one.get(key)
            if row is None:
                continue
            y = place - 0.4 + (number + 0.5) * width
            color = f"C{number % 10}"
            axes.barh(y, row.value, height=width * 0.9, color=color, alpha=0.75, xerr=row.stderr, ecolor="0.2")
            right = row.value + (row.stderr or 0.0)
            if row.expected is not None:
                axes.plot([row.expected] * 2, [y - width * 0.45, y + width * 0.45], color="black", linewidth=2.5)
                marks["published"] = Line2D([], [], color="black", linewidth=2.5)
                right = max(right, row.expected) if row.expected < row.value + 0.12 else right
            if row.random_baseline:
                ends = [y - width * 0.45, y + width * 0.45]
                axes.plot([row.random_baseline] * 2, ends, color="C3", linewidth=1.5, linestyle=":")
                marks["by chance"] = Line2D([], [], color="C3", linewidth=1.5, linestyle=":")
            axes.text(right + 0.01, y, f"{row.value:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(keys)), [f"{task}\n{short(metric)}" for task, metric in keys], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if len(rows) > 1:
        marks = {name: Line2D([], [], color=f"C{i % 10}", linewidth=6) for i, name in enumerate(names)} | marks
    if marks:
        axes.legend(marks.values(), marks.keys(), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
