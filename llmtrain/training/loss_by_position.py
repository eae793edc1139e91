"""Loss as a function of position, in each evaluation of a run: the proof that a long context helps."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.evaluation.by_position import Bin, LossByPosition
from llmtrain.evaluation.picture import draw_loss_by_position
from llmtrain.model.documents import documents_of, positions_in
from llmtrain.model.mpt import MPT
from llmtrain.training.language_model import LanguageModel

NAME = "loss_by_position"
"""Of the files in the run's folder, NAME.json and NAME.png, and of the metrics, NAME/EVALUATOR/FIRST-LAST."""


class LossByPositionCallback(Callback):  # type: ignore[misc]
    """Sums up the losses of each evaluation by the position of the target: the tokens that the model saw before it.

    It costs nothing but the sums: the losses are those of the evaluation's own forward. Loggers get the mean of each
    doubling of the position; RUN/loss_by_position.json has finer bins of each evaluation, RUN/loss_by_position.png
    draws the first one and the latest. The targets of all ranks count. Where packed documents are kept apart, a
    position is one in its document.

    The settings are those of `llmtrain.training.callbacks.LossByPositionConfig`.
    """

    def __init__(self, curves: int = 4) -> None:
        self.curves = curves
        self._folder: Path | None = None
        self._losses: LossByPosition | None = None

    def attach(self, folder: Path) -> None:
        """Gives it the run's folder."""
        self._folder = folder

    def fit_start(self, state: State, logger: Logger) -> None:
        if all(_language_model(state).is_task(evaluator.label) for evaluator in state.evaluators):
            raise UserError("callbacks.loss_by_position: there is no evaluation in this run. Add an eval_loader.")

    def eval_start(self, state: State, logger: Logger) -> None:
        if _language_model(state).is_task(str(state.dataloader_label)):
            return
        self._losses = LossByPosition(state.device._device)
        _language_model(state).gives_token_losses = True

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self._losses is None:  # a task
            return
        token_losses = state.outputs.token_losses
        assert token_losses is not None
        sharing = getattr(_language_model(state).model, "ranks", None)
        if sharing is not None and sharing.rank != 0:
            return  # each of the ranks that share sequences has the losses of all their tokens
        self._losses.add(token_losses, state.batch["labels"], _positions(state))

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._losses is None:
            return
        _language_model(state).gives_token_losses = False
        losses, self._losses = _over_ranks(self._losses), None
        label, step = str(state.dataloader_label), int(state.timestamp.batch)
        logger.log_metrics({f"{NAME}/{label}/{b.first}-{b.last}": b.loss for b in losses.octaves()})
        if dist.get_global_rank() == 0 and self._folder is not None:
            self._write(self._folder, label, step, losses)

    def _write(self, folder: Path, label: str, step: int, losses: LossByPosition) -> None:
        """Adds an evaluation to the file. What a later step or an earlier start of the run has written there goes."""
        file = folder / f"{NAME}.json"
        kept = [row for row in _read(file) if (row["step"], row["evaluator"] == label) < (step, True)]
        row = {"step": step, "evaluator": label, "loss": losses.loss, "targets": losses.targets}
        rows = [*kept, {**row, "by_position": [b.as_dict() for b in losses.curve()]}]
        temporary = file.with_name(f".{file.name}")
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
        try:
            draw_loss_by_position(_curves(rows, self.curves), folder.name, folder / f"{NAME}.png")
        except Exception as error:  # no picture is worth a run
            print(f"warning: {folder / NAME}.png was not drawn: {error}", file=sys.stderr, flush=True)


def _positions(state: State) -> Tensor | None:
    """Positions in documents, where the model keeps those of a row apart; None where they are the row's."""
    model = _language_model(state).model
    documents: Tensor | None = state.batch.get("sequence_id")
    if documents is None or (isinstance(model, MPT) and not model.config.attn_config.attn_uses_sequence_id):
        return None
    return positions_in(documents_of(documents, state.batch.get("attention_mask")))


def _over_ranks(losses: LossByPosition) -> LossByPosition:
    """The sum over ranks, the same on each; their longest rows may differ."""
    length = torch.tensor([len(losses.sums)], device=losses.sums.device)
    dist.all_reduce(length, reduce_operation="MAX")
    both = torch.zeros(2, int(length), dtype=torch.float64, device=losses.sums.device)
    both[0, : len(losses.sums)], both[1, : len(losses.counts)] = losses.sums, losses.counts
    dist.all_reduce(both, reduce_operation="SUM")
    total = LossByPosition(losses.sums.device)
    total.merge(both[0], both[1])
    return total


def _language_model(state: State) -> LanguageModel:
    model: LanguageModel = state.model.module if state.is_model_ddp else state.model
    return model


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet
        return []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _curves(rows: list[dict[str, Any]], most: int) -> dict[str, list[Bin]]:
    """Of each evaluator the first evaluation, and the latest ones up to `most` in all."""
    curves = {}
    for label in dict.fromkeys(row["evaluator"] for row in rows):
        mine = [row for row in rows if row["evaluator"] == label]
        for row in [*mine[:1], *mine[1:][-(most - 1) :]] if most > 1 else mine[-1:]:
            curves[f"{label}, step {row['step']}"] = [Bin(**b) for b in row["by_position"]]
    return curves
