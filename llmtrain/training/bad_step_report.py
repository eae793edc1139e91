"""What is known about a bad step: RUN/bad_steps/step-N.json, and a short version for people."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.training.first_not_finite import Culprit, plain_name
from llmtrain.training.skipped_steps import write_json

FOLDER = "bad_steps"
MOST = 8
"""Things of a kind that the short version names."""


@dataclass
class MicroBatch:
    """One micro-batch of one rank.

    Attributes:
        rank: whose.
        number: from 1.
        loss: mean over its targets, in nats.
        samples: ids of the samples in each row, as `llmtrain.data.batch.sample_ids` gives them.
    """

    rank: int
    number: int
    loss: float
    samples: list[list[int]]


@dataclass
class Report:
    """One bad step.

    Attributes:
        step: counted from 1; the update that it would have made is not applied.
        problem: one line.
        decision: what the run does now.
        micro_batches: those whose loss is not finite, of all ranks; where all losses are finite (and of a spike), all.
        of_micro_batches: micro-batches of one rank's batch.
        weights_not_finite: names of weights that were not finite before this step.
        culprits: by rank, what came first when the micro-batch `searched` was run again.
        searched: number of that micro-batch, from 1; None before the search and where none was needed.
        search_note: what is to be said about the search.
        gradient_norms: L2 norms by parameter, before clipping.
        last_checkpoint: name of the newest complete checkpoint; it precedes this step.
    """

    step: int
    problem: str
    decision: str
    micro_batches: list[MicroBatch]
    of_micro_batches: int
    weights_not_finite: list[str] = field(default_factory=list)
    culprits: dict[int, Culprit] = field(default_factory=dict)
    searched: int | None = None
    search_note: str = ""
    gradient_norms: dict[str, float] = field(default_factory=dict)
    last_checkpoint: str | None = None

    def written(self, run: Path) -> str:
        """Replaces the step's file in one step, and says where it is; or why not: no report is worth a run."""
        try:
            return f"the full report: {self.write(run)}"
        except OSError as error:
            return f"the full report was not written: {error.strerror or error}: {run / FOLDER}"

    def write(self, run: Path) -> Path:
        """Replace the step's file in one step."""
        content = asdict(self)
        content["gradient_norms_by_layer"] = by_layer(self.gradient_norms)
        file = run / FOLDER / f"step-{self.step}.json"
        write_json(file, _strict(content))
        return file

    def lines(self, written: str) -> list[str]:
        """The short version; it ends with what `written` has said."""
        lines = [f"step {self.step}: {self.problem}"]
        lines += [self._of(batch) for batch in self.micro_batches[:MOST]]
        if len(self.micro_batches) > MOST:
            lines.append(f"and {len(self.micro_batches) - MOST} more micro-batches: see the report")
        if self.weights_not_finite:
            lines.append(f"weights that are not finite before this step: {some(self.weights_not_finite)}")
        if self.culprits:
            rank, first = min(self.culprits.items())
            name = first.module or "(no module)"
            lines.append(
                f"first in {name} ({first.phase} pass, rank {rank}, micro-batch {self.searched}): {first.what}"
            )
        if self.search_note:
            lines.append(self.search_note)
        lines.append(self._norms())
        lines.append(self.decision)
        lines.append(written)
        return [line for line in lines if line]

    def _of(self, batch: MicroBatch) -> str:
        ids = [number for row in batch.samples for number in row]
        samples = f"samples {some(ids)}" if ids else "samples unknown (the batch has no ids)"
        where = f"rank {batch.rank}, micro-batch {batch.number} of {self.of_micro_batches}"
        return f"{where}: loss {batch.loss:.4g}, {samples}"

    def _norms(self) -> str:
        layers = by_layer(self.gradient_norms)
        if not layers:
            return ""
        bad = [name for name, norm in layers.items() if not math.isfinite(norm)]
        if bad:
            return f"gradient norms are not finite in {len(bad)} of {len(layers)} layers: {some(bad)}"
        largest = sorted(layers.items(), key=lambda pair: -pair[1])[:3]
        return "largest gradient norms: " + ", ".join(f"{name} {norm:.3g}" for name, norm in largest)


def by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """L2 norms of parameters as those of layers: blocks by their number, anything else by its module."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        block = re.match(r".*?\.\d+(?=\.)", name)
        layer = block[0] if block else name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    return {layer: math.sqrt(square) for layer, square in squares.items()}


def gradient_norms(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of the optimizer monitor's norms, those of the gradients, by the names of the parameters."""
    prefix = "l2_norm/grad/"
    return {
        plain_name(key.removeprefix(prefix)): value
        for key, value in metrics.items()
        if key.startswith(prefix) and key != f"{prefix}global"
    }


def some(names: list[Any]) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:MOST])
    return shown + (f" and {len(names) - MOST} more" if len(names) > MOST else "")


def _strict(value: Any) -> Any:
    """Numbers that are not finite become strings: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(part) for key, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, (list, tuple)) else value
