"""Which checkpoint of a run is the best one: `checkpoints/best.json`, and the link `checkpoints/best`. Light."""

import json
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, ValidationError

from llmtrain.config.base import Config
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

BEST = "best"
RECORD = "best.json"


class BestCheckpointConfig(Config):
    """Keeps the checkpoint of the evaluation with the best value so far."""

    monitor: str = "LanguageCrossEntropy"
    """Name of the metric: `LanguageCrossEntropy`, `LanguagePerplexity`, `TokenAccuracy`, or a task's. Of the gauntlet,
    the name of a category or average."""
    dataloader_label: str = "eval"
    """The evaluator that computes it: `eval`, `eval/LABEL` when there are several, a task's `LABEL/N-shot`, or
    `eval_gauntlet`."""
    comp: Literal["less", "lt", "greater", "gt"] | None = None
    """What is better; when left out, less for losses, errors and perplexities, greater for the rest."""
    min_delta: NonNegativeFloat = 0.0
    """Changes up to this size are no improvement."""

    @property
    def less_is_better(self) -> bool:
        """Whether small values are good."""
        return lower_is_better(self.monitor) if self.comp is None else self.comp in ("less", "lt")


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss, an error or a perplexity, going by its name."""
    return any(part in metric.lower() for part in ("loss", "error", "perplexity", "entropy"))


class Best(Config):
    """The content of best.json."""

    checkpoint: str
    """Name of the folder beside it."""
    step: int
    """Finished optimizer steps."""
    monitor: str
    """The metric."""
    dataloader_label: str
    """The evaluator."""
    value: float
    """Of the metric."""


def read_best(folder: Path) -> Best | None:
    """The record of a `checkpoints/` folder; None when there is none that can be read."""
    try:
        return Best.model_validate(parse_json((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None


def write_best(folder: Path, best: Best, staging: Path) -> None:
    """Replace the record, then the link, each in one step.

    Args:
        folder: `checkpoints/`; `best.checkpoint` lies there.
        best: what to write.
        staging: a folder on the same file system, for what is not finished.
    """
    staging.mkdir(parents=True, exist_ok=True)
    record, link = staging / RECORD, staging / BEST
    record.write_text(json.dumps(best.model_dump(), indent=1) + "\n", encoding="utf-8")
    record.replace(folder / RECORD)
    _link(folder, best, link)


def mend_link(folder: Path, best: Best) -> None:
    """Have the link agree with the record, where a run was killed between the two."""
    link = folder / BEST
    if not link.is_symlink() or str(link.readlink()) != best.checkpoint:
        _link(folder, best, folder / f".{BEST}.writing")


def _link(folder: Path, best: Best, temporary: Path) -> None:
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(best.checkpoint)
    temporary.replace(folder / BEST)


def forget_best(folder: Path) -> None:
    """Remove record and link."""
    (folder / BEST).unlink(missing_ok=True)
    (folder / RECORD).unlink(missing_ok=True)


def follow_best(link: Path) -> Path:
    """The checkpoint that `checkpoints/best` points to.

    Raises:
        UserError: it is not there any more.
    """
    target = link.parent / link.readlink()
    if not target.is_dir():
        known = read_best(link.parent)
        was = "" if known is None else f" (step {known.step}, {known.monitor} {known.value:.6g})"
        raise UserError(f"{link}: points to {target.name}{was}, which is not there any more. Name another checkpoint.")
    return target
