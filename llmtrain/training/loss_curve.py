"""The loss-curve picture of a run."""

import json
import math
from pathlib import Path

TRAIN_LOSS = "loss/train/total"
SKIPPED = "step/skipped"
"""1 at a step whose update was not applied."""
MOST_SOURCES = 6
"""Sources of mixtures that the picture shows; where there are more, metrics.jsonl alone has them."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl; half a line at its end (a killed run) is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average with bias correction, so that the start is not pulled to zero."""
    average, out = 0.0, []
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draws training loss (each step and smoothed) and validation cross-entropy over steps, also of few sources."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics)
    logged = [row for row in rows if TRAIN_LOSS in row]
    # A step that was left out may have any loss; the curve is of the others, and has a mark there.
    train = [(row["step"], row[TRAIN_LOSS]) for row in logged if math.isfinite(row[TRAIN_LOSS]) and SKIPPED not in row]
    skipped = [row["step"] for row in rows if SKIPPED in row]
    evals: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("metrics/") and key.endswith("/LanguageCrossEntropy"):
                label = key.removeprefix("metrics/").removesuffix("/LanguageCrossEntropy")
                evals.setdefault(label, []).append((row["step"], value))
    if not train and not evals:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
        axes.plot(steps, smoothed(list(losses)), color="tab:blue", label="train, smoothed")
    for i, step in enumerate(skipped):
        axes.axvline(step, color="tab:red", alpha=0.4, linewidth=0.8, label="no update" if i == 0 else None)
    sources = [label for label in sorted(evals) if label.rpartition("/")[0] in evals]
    for i, label in enumerate(label for label in sorted(evals) if label not in sources):
        steps, losses = zip(*evals[label], strict=True)
        axes.plot(steps, losses, "o-", color=f"C{i + 1}", markersize=4, label=f"{label}, {losses[-1]:.3f} at the end")
    for i, label in enumerate(sources if len(sources) <= MOST_SOURCES else []):
        steps, losses = zip(*evals[label], strict=True)
        grey = str(0.25 + 0.5 * i / max(1, len(sources) - 1))
        axes.plot(steps, losses, "--", color=grey, linewidth=1, label=f"{label}, {losses[-1]:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(picture)
