"""The loss-curve picture of a run."""

import json
import math
from array import array
from contextlib import suppress
from pathlib import Path

from llmtrain.garbage import collected_afterwards

TRAIN_LOSS = "loss/train/total"
SKIPPED = "step/skipped"
"""1 at a step whose update was not applied."""
MOST_POINTS = 1_000
"""Of the training loss in the picture, which is 960 pixels wide; longer runs show every second, third, ... step."""
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


class Smoothed:
    """Exponential moving average with bias correction, so that the start is not pulled to zero.

    Args:
        weight: of what was before.
    """

    def __init__(self, weight: float = 0.95) -> None:
        self._weight, self._average, self._seen = weight, 0.0, 0

    def next(self, value: float) -> float:
        """The average, this value among the others."""
        self._seen += 1
        self._average = self._weight * self._average + (1 - self._weight) * value
        return self._average / (1 - self._weight**self._seen)


def draw_loss_curve(metrics: Path, picture: Path) -> None:
    """Draws training loss (each step and smoothed) and validation cross-entropy over steps, also of few sources."""
    LossCurve(metrics).draw(picture)


class LossCurve:
    """The picture of a run that goes on: what metrics.jsonl has got since the last time is read, and numbers are kept.

    To read all of it for each picture would take seconds and gigabytes of a run of a million steps.

    Args:
        metrics: the run's metrics.jsonl.
    """

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self._forget()

    def _forget(self) -> None:
        self._read = 0
        self._steps, self._losses, self._smooth, self._skipped = (array("d") for _ in range(4))
        self._average = Smoothed()
        self._evaluations: dict[str, tuple[array[float], array[float]]] = {}

    def read_on(self) -> None:
        """Takes in the lines that are new; all of them when the file has become shorter."""
        if self.metrics.stat().st_size < self._read:
            self._forget()
        with self.metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                with suppress(ValueError):
                    self._add(json.loads(line))

    def _add(self, row: dict[str, float]) -> None:
        # A step that was left out may have any loss; the curve is of the others, and has a mark there.
        if SKIPPED in row:
            self._skipped.append(row["step"])
        elif TRAIN_LOSS in row and math.isfinite(row[TRAIN_LOSS]):
            self._steps.append(row["step"])
            self._losses.append(row[TRAIN_LOSS])
            self._smooth.append(self._average.next(row[TRAIN_LOSS]))
        for key, value in row.items():
            if key.startswith("metrics/") and key.endswith("/LanguageCrossEntropy"):
                label = key.removeprefix("metrics/").removesuffix("/LanguageCrossEntropy")
                steps, values = self._evaluations.setdefault(label, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)

    def draw(self, picture: Path) -> None:
        """Draws what there is by now; nothing where there is neither a loss nor an evaluation."""
        self.read_on()
        if self._steps or self._evaluations:
            with collected_afterwards():
                self._draw(picture)

    def _draw(self, picture: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        evals = self._evaluations
        figure, axes = plt.subplots(figsize=(8, 4.5))
        # A layout that matplotlib works out draws all text twice: half of the time that a picture takes.
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.11, top=0.93)
        if self._steps:
            every = -(-len(self._steps) // MOST_POINTS)
            steps, losses = self._steps[::every], self._losses[::every]
            axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
            axes.plot(steps, self._smooth[::every], color="tab:blue", label="train, smoothed")
        for i, step in enumerate(self._skipped):
            axes.axvline(step, color="tab:red", alpha=0.4, linewidth=0.8, label="no update" if i == 0 else None)
        sources = [label for label in sorted(evals) if label.rpartition("/")[0] in evals]
        for i, label in enumerate(label for label in sorted(evals) if label not in sources):
            steps, losses = evals[label]
            axes.plot(
                steps, losses, "o-", color=f"C{i + 1}", markersize=4, label=f"{label}, {losses[-1]:.3f} at the end"
            )
        for i, label in enumerate(sources if len(sources) <= MOST_SOURCES else []):
            steps, losses = evals[label]
            grey = str(0.25 + 0.5 * i / max(1, len(sources) - 1))
            axes.plot(steps, losses, "--", color=grey, linewidth=1, label=f"{label}, {losses[-1]:.3f}")
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy (nats per token)")
        axes.set_title(self.metrics.parent.name)
        axes.grid(alpha=0.3)
        axes.legend()
        temporary = picture.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=120)
        plt.close(figure)
        temporary.replace(picture)
