"""runs/NAME: the one folder that a run leaves."""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from llmtrain.tokenizer import save_tokenizer
from llmtrain.training.logger_destinations import WANDB_RUN_ID
from llmtrain.training.loss_curve import TRAIN_LOSS, LossCurve, read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SECONDS_BETWEEN_DRAWINGS = 10.0
"""loss.png takes half a second of a core: too much after each evaluation of a tiny run, or of several loaders."""


class RunFolder:
    """Paths inside a run's folder.

    Args:
        path: `runs/NAME`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.loss_curve = path / "loss.png"
        self.tokenizer = path / "tokenizer"

    def create(self, recipe_yaml: str, tokenizer: "PreTrainedTokenizerFast", *, anew: bool) -> None:
        """Makes the folder, with the resolved recipe and the tokenizer.

        Args:
            recipe_yaml: the text of recipe.yaml.
            tokenizer: saved so that the folder stands on its own.
            anew: the run starts at step 0: trackers begin a new run, too, instead of going on in an earlier one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if anew:
            (self.path / WANDB_RUN_ID).unlink(missing_ok=True)
        save_tokenizer(tokenizer, self.tokenizer)
        temporary = self.recipe.with_suffix(".tmp")
        temporary.write_text(recipe_yaml)
        temporary.replace(self.recipe)


class MetricsFile(LoggerDestination):  # type: ignore[misc]
    """metrics.jsonl, one object a step, and loss.png, drawn at evaluations and at the end; always on.

    A resumed run first drops the lines of steps that it is going to repeat, so that each step stands there once.

    Args:
        folder: where they go; only rank 0 writes.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._enabled = dist.get_global_rank() == 0
        self._pending: dict[str, Any] = {}
        self._lines: list[str] = []
        self._told = False
        self._step: int | None = None
        self._drawn = time.monotonic()
        self._curve = LossCurve(folder.metrics)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not self._enabled:
            return
        if step != self._step:
            self._flush()
            self._step = step
        self._pending.update({key: _plain(value) for key, value in metrics.items()})

    def after_load(self, state: State, logger: Logger) -> None:
        if self._enabled and self.folder.metrics.exists():
            temporary = self.folder.metrics.with_suffix(".tmp")
            temporary.write_text(
                "".join(json.dumps(row) + "\n" for row in self._rows_before(int(state.timestamp.batch)))
            )
            temporary.replace(self.folder.metrics)
            self._curve = LossCurve(self.folder.metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._flush()

    def eval_end(self, state: State, logger: Logger) -> None:
        self._flush()
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._flush()  # averages over several evaluators

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self._flush()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._flush()
        self._draw()

    def close(self, state: State, logger: Logger) -> None:
        self._flush()

    def _rows_before(self, step: int) -> list[dict[str, Any]]:
        """What a run that continues at `step` will not log again.

        Rows are written at the end of a batch and of an evaluation, so at the checkpoint's own step those without a
        training loss came before the checkpoint, and the one with a training loss after it.
        """
        return [
            row
            for row in read_metrics(self.folder.metrics)
            if row["step"] < step or (row["step"] == step > 0 and TRAIN_LOSS not in row)
        ]

    def _flush(self) -> None:
        """Writes the step's line; a disk that is full ends no run: lines wait until there is room again."""
        if self._pending:
            self._lines.append(json.dumps({"step": self._step, **self._pending}) + "\n")
            self._pending = {}
        if not self._lines:
            return
        size = self.folder.metrics.stat().st_size if self.folder.metrics.exists() else 0
        try:
            with self.folder.metrics.open("a") as file:
                file.writelines(self._lines)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.folder.metrics, size)  # no half of a line
            if not self._told:
                line = f"warning: {self.folder.metrics} cannot be written ({error.strerror}); its lines wait in memory"
                print(line, file=sys.stderr, flush=True)
            self._told = True
            return
        self._lines, self._told = [], False

    def _draw(self) -> None:
        if self._enabled and self.folder.metrics.exists():
            try:
                self._curve.draw(self.folder.loss_curve)
            except Exception as error:  # no picture is worth a run
                print(f"warning: {self.folder.loss_curve} was not drawn: {error}", file=sys.stderr, flush=True)
            self._drawn = time.monotonic()


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
