"""Keeps the best checkpoint: the one of the evaluation with the best value so far."""

from pathlib import Path

import torch
from composer import Callback, Logger, State

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import Best, BestCheckpointConfig, forget_best, mend_link, read_best
from llmtrain.errors import UserError
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.checkpoint_saver import CheckpointSaver
from llmtrain.training.environment import say
from llmtrain.training.icl_callback import EvalGauntlet


class BestCheckpoint(Callback):  # type: ignore[misc]
    """After an evaluation that is better than all before, has the saver save that step and link it as `best`.

    Composer evaluates before it gives the word to save, so the checkpoint is of the weights that were evaluated; its
    name and content are those that it would have had anyway. The best value lies beside the checkpoints, so a resumed
    run knows it. An evaluation before the first step does not count.

    Args:
        cfg: what is watched.
        saver: of the run.
        gauntlet: of the run, if it has one.
    """

    def __init__(self, cfg: BestCheckpointConfig, saver: CheckpointSaver, gauntlet: EvalGauntlet | None) -> None:
        self.cfg = cfg
        self.saver = saver
        self.gauntlet = gauntlet
        self.best: float | None = None
        self._over = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Takes up what an earlier start of the run has found."""
        step = int(state.timestamp.batch)
        known = from_rank_zero(lambda: self._known(step))
        if known is not None:
            self.best = known.value
            self.saver.protected = known.checkpoint

    def eval_after_all(self, state: State, logger: Logger) -> None:
        value, step = self._value(state), int(state.timestamp.batch)
        if value is None or value != value or step == 0:
            return
        if self.saver.best_lost:  # it could not be written
            self.saver.best_lost = False
            known = from_rank_zero(lambda: read_best(self.saver.folder))
            self.best = known.value if known is not None else None
        if self.best is not None:
            gain = self.best - value if self.cfg.less_is_better else value - self.best
            if gain <= self.cfg.min_delta:
                return
        self.best = value
        self.saver.wants_best(self.cfg.monitor, self.cfg.dataloader_label, value)
        if self._over:  # the last evaluation of a run comes after the last word to save
            self.saver.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._over = True

    def _value(self, state: State) -> float | None:
        if self.gauntlet is not None and self.cfg.dataloader_label == "eval_gauntlet":
            return self.gauntlet.latest.get(self.cfg.monitor)
        metrics = state.eval_metrics.get(self.cfg.dataloader_label, {})
        if self.cfg.monitor not in metrics:
            raise UserError(
                f"best_checkpoint.monitor: {self.cfg.dataloader_label} has no metric {self.cfg.monitor}. "
                f"It has {', '.join(sorted(metrics)) or 'none'}."
            )
        return float(torch.as_tensor(metrics[self.cfg.monitor].compute()))

    def _known(self, step: int) -> Best | None:
        """The record of an earlier start, if it still holds; otherwise it goes."""
        folder: Path = self.saver.folder
        known = read_best(folder)
        if known is None:
            return None
        reason = None
        if self.saver.replaces:
            reason = ""
        elif (known.monitor, known.dataloader_label) != (self.cfg.monitor, self.cfg.dataloader_label):
            reason = f"it was that of {known.monitor} on {known.dataloader_label}"
        elif known.step > step:
            reason = f"it is of step {known.step}, and this run continues after step {step}"
        elif known.checkpoint in self.saver.refused:
            reason = "it is damaged"
        elif problems := manifest.verify_sizes(folder / known.checkpoint):
            reason = problems[0]
        if reason is None:
            mend_link(folder, known)
            return known
        if reason:
            say(f"best_checkpoint: {known.checkpoint} is no longer the best: {reason}")
        forget_best(folder)
        return None
