"""Looks at each step before its update: is anything not finite, has the loss jumped? `bad_steps` in the recipe."""

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Callback, Event, Logger, State
from composer.core.precision import Precision
from composer.utils import dist
from torch.nn.utils import get_total_norm

from llmtrain.checkpoint.resolve import CheckpointInfo, checkpoints_in, first_intact
from llmtrain.errors import UserError
from llmtrain.training import bad_step_search, skipped_steps, watching
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.bad_step_report import MicroBatch, Report, gradient_norms, some
from llmtrain.training.bad_step_search import Seen
from llmtrain.training.bad_steps_config import BadStepsConfig
from llmtrain.training.checkpoint_saver import CheckpointSaver
from llmtrain.training.environment import say, say_each
from llmtrain.training.first_not_finite import local, not_finite
from llmtrain.training.loss_curve import SKIPPED
from llmtrain.training.loss_window import LossWindow, Spike
from llmtrain.training.optimizer_monitor import norms
from llmtrain.training.resume import verify_together
from llmtrain.training.skipped_steps import RewindRecord


class BadStep(UserError):
    """The run is stopped by `bad_steps`, with the weights from before the step. Raised on all ranks together."""


class Rewind(Exception):
    """The run goes back to a checkpoint; where to is in skipped_steps.json. Raised on all ranks together."""


@dataclass(frozen=True)
class _Measured:
    """What all ranks know of a step: number of losses that are not finite, the gradient, the mean loss of a token."""

    bad_losses: int
    bad_gradient: bool
    loss: float | None


class BadSteps(Callback):  # type: ignore[misc]
    """Decides before each update whether it is applied.

    Composer runs algorithms before callbacks, and clipping is an algorithm: with a norm that is not finite it makes all
    gradients so. So the decision is an algorithm as well, which `first` puts before all others; it is none of the
    recipe's, so that it does not go into checkpoints. What has to go there (the window of losses, the number of skipped
    steps) goes as a callback's state: a resume decides as the first time.

    Must stand before the saver in the list of callbacks.

    Args:
        cfg: the recipe's.
        run: the run's folder.
        rewinds: those of the run so far.
        saver: the run's.
    """

    def __init__(
        self, cfg: BadStepsConfig, run: Path, rewinds: Sequence[RewindRecord], saver: CheckpointSaver | None
    ) -> None:
        self.cfg = cfg
        self.run = run
        self.rewinds = list(rewinds)
        self.saver = saver
        self.window = LossWindow(cfg.loss_spike) if cfg.loss_spike is not None else None
        self.skipped = {"non_finite": 0, "loss_spike": 0}
        self._seen: list[Seen] = []
        self._decision = _Decision(self)
        if saver is not None:
            saver.before_hooks.append(self.refuse_to_save)

    def first(self, algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        """Composer's `algorithm_passes`: the decision comes before the algorithms of this event."""
        return [self._decision, *algorithms] if event == Event.AFTER_TRAIN_BATCH else algorithms

    def state_dict(self) -> dict[str, Any]:
        """Text, so that its shape in a sharded checkpoint does not depend on the recipe."""
        window = self.window.state_dict() if self.window is not None else None
        return {"json": json.dumps({"skipped": self.skipped, "window": window})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = json.loads(state["json"])
        self.skipped = {key: int(kept["skipped"][key]) for key in self.skipped}
        if self.window is not None and kept["window"] is not None:
            self.window.load_state_dict(kept["window"])

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._seen = []

    def before_forward(self, state: State, logger: Logger) -> None:
        self._seen.append(Seen.begin(state.batch))

    def after_loss(self, state: State, logger: Logger) -> None:
        self._seen[-1].end(state.loss, state.outputs)

    def decide(self, state: State, logger: Logger) -> None:
        """Leaves the gradients as they are, or removes them, or raises (a collective call)."""
        step = int(state.timestamp.batch) + 1
        if (rewind := skipped_steps.is_left_out(self.rewinds, step)) is not None:
            say(f"skipped     step {step}: left out since the run went back from step {rewind.found_at}")
            self._leave_out(state, logger)
            self._seen = []
            return
        found = self._measure(state)
        if found.bad_losses or found.bad_gradient:
            self._not_finite(state, logger, step, found)
        elif self.window is not None and found.loss is not None:
            spike = self.window.look(step, found.loss)
            if spike is not None:
                self._spike(state, logger, spike)
        self._seen = []

    def refuse_to_save(self, state: State) -> None:
        """Weights that an update has blown up are not saved (a collective call).

        Raises:
            BadStep: on all ranks: weights are not finite.
        """
        ours = _bad_weights(state)
        count = torch.tensor([len(ours)])
        count = state.device.tensor_to_device(count)
        dist.all_reduce(count, reduce_operation="SUM")
        if not count.item():
            return
        names = _all_names(ours)
        raise BadStep(
            f"step {int(state.timestamp.batch)}: its update has left {len(names)} weights that are not finite, "
            f"though its gradient was: {some(names)}\n            stopped; nothing of it was saved"
        )

    def _measure(self, state: State) -> _Measured:
        """One pass over this rank's gradients, and one all-reduce of four numbers."""
        losses = torch.stack([seen.loss for seen in self._seen])
        bad = (~torch.isfinite(losses)).sum()
        gradients = [local(p.grad) for p in state.model.parameters() if p.grad is not None]
        bad_gradient = torch.zeros_like(bad)
        # With the scaler of fp16 gradients that are inf are normal: it leaves out the step and lowers its scale.
        if gradients and state.precision != Precision.AMP_FP16:
            bad_gradient = (~torch.isfinite(get_total_norm(gradients))).to(bad)
        loss_sum = torch.stack([seen.loss_sum for seen in self._seen]).sum()
        n_targets = torch.stack([seen.n_targets for seen in self._seen]).sum()
        ours = torch.stack([bad.double(), bad_gradient.double(), loss_sum, n_targets])
        dist.all_reduce(ours, reduce_operation="SUM")
        losses_sum, gradients_sum, nats, tokens = ours.tolist()
        return _Measured(int(losses_sum), gradients_sum > 0, nats / tokens if tokens else None)

    def _not_finite(self, state: State, logger: Logger, step: int, found: _Measured) -> None:
        _takes_its_time(step)
        weights = _all_names(_bad_weights(state))
        if weights:
            problem = f"{len(weights)} weights are not finite before this step"
        elif found.bad_losses:
            problem = "the loss is not finite"
        else:
            problem = "the loss is finite, and the gradient is not"
        cfg = self.cfg.non_finite
        skips = cfg.action == "skip" and not weights
        if not skips:
            decision = "stopped"
        elif skips := self.skipped["non_finite"] < cfg.max_skipped:
            self.skipped["non_finite"] += 1
            decision = f"the step is skipped ({self.skipped['non_finite']} of {cfg.max_skipped})"
        else:
            decision = f"stopped: {cfg.max_skipped} steps of this run were skipped before (non_finite.max_skipped)"
        report = self._report(state, step, problem, decision, only_bad=found.bad_losses > 0)
        report.weights_not_finite = weights
        self._leave_out(state, logger)
        self._write(report)  # what is known before the search, which may fail where this step did
        if not weights:
            bad_step_search.search(state, self._seen, report, forward=found.bad_losses > 0)
        self._end(report, stops=not skips)

    def _spike(self, state: State, logger: Logger, spike: Spike) -> None:
        cfg = self.cfg.loss_spike
        assert cfg is not None
        _takes_its_time(spike.last)
        used = len(self.rewinds) + self.skipped["loss_spike"]
        place: CheckpointInfo | None = None
        first = max(1, spike.first - cfg.skip_before)
        last = spike.last + cfg.skip_after
        if cfg.action == "stop":
            decision = "stopped"
        elif used >= cfg.max_rewinds:
            decision = f"stopped: {used} spikes of this run were left out before (loss_spike.max_rewinds)"
        elif cfg.action == "rewind" and (place := self._newest_before(first)) is not None:
            decision = f"going back to {place.path.name}, leaving out steps {first}-{last}"
        else:
            self.skipped["loss_spike"] += 1
            reason = f"no checkpoint before step {first} to go back to: " if cfg.action == "rewind" else ""
            decision = f"{reason}the step is skipped ({used + 1} of {cfg.max_rewinds})"
        report = self._report(state, spike.last, str(spike), decision, only_bad=False)
        self._leave_out(state, logger)
        if place is None:
            self._end(report, stops=decision.startswith("stopped"), word="spike")
            return
        self._write(report)
        record = RewindRecord(
            reason=str(spike),
            first=first,
            last=last,
            found_at=spike.last,
            checkpoint=place.path.name,
            step=place.step,
            when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        from_rank_zero(lambda: skipped_steps.add(self.run, record))
        say(f"spike       step {spike.last}: {spike}; {decision}")
        raise Rewind

    def _newest_before(self, first: int) -> CheckpointInfo | None:
        """The newest intact checkpoint that knows nothing of step `first` (a collective call)."""
        saver = self.saver
        if saver is None:
            return None
        saver.finish()

        def candidates() -> list[CheckpointInfo]:
            return [
                info
                for info in checkpoints_in(saver.folder)
                if info.step < first
                and info.manifest is not None
                and not info.manifest.weights_only
                and info.path not in saver.replaces
            ]

        found, _ = first_intact(from_rank_zero(candidates), verify_together, say)
        return found

    def _leave_out(self, state: State, logger: Logger) -> None:
        """Torch's optimizers pass over parameters without a gradient: weights and moments stay as they are."""
        logger.log_metrics({SKIPPED: 1})
        self._drop(state)

    @staticmethod
    def _drop(state: State) -> None:
        for parameter in state.model.parameters():
            parameter.grad = None

    def _report(self, state: State, step: int, problem: str, decision: str, *, only_bad: bool) -> Report:
        ours = [
            MicroBatch(dist.get_global_rank(), number, loss, seen.samples())
            for number, seen in enumerate(self._seen, 1)
            if not (math.isfinite(loss := float(seen.loss)) and only_bad)
        ]
        report = Report(
            step=step,
            problem=problem,
            decision=decision,
            micro_batches=[batch for part in dist.all_gather_object(ours) for batch in part],
            of_micro_batches=len(self._seen),
            gradient_norms=gradient_norms(norms(state.model, state.optimizers[0], layers=True)),
        )
        if self.saver is not None:
            self.saver.finish()
            folder = self.saver.folder
            report.last_checkpoint = from_rank_zero(
                lambda: next((info.path.name for info in checkpoints_in(folder) if info.problem is None), None)
            )
        return report

    def _write(self, report: Report) -> str:
        return from_rank_zero(lambda: report.written(self.run))

    def _end(self, report: Report, *, stops: bool, word: str = "bad step") -> None:
        """Writes the report, says its short version, and stops or goes on."""
        if stops:
            last = report.last_checkpoint
            kept = f"the last checkpoint is {last}, before this step" if last else "there is no checkpoint"
            report.decision += f". The update was not applied; {kept}"
        lines = report.lines(self._write(report))
        if stops:
            raise BadStep("\n            ".join([f"{lines[0]}", *lines[1:]]))
        say_each([f"{word:<12}{lines[0]}", *(f"{'':<12}{line}" for line in lines[1:])])


class _Decision(Algorithm):  # type: ignore[misc]
    """The point in time at which `BadSteps` decides."""

    def __init__(self, guard: BadSteps) -> None:
        self.guard = guard

    def match(self, event: Event, state: State) -> bool:
        return bool(event == Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.guard.decide(state, logger)


def _takes_its_time(step: int) -> None:
    """What follows is no step any more: it waits for a save, hashes a checkpoint, runs micro-batches again."""
    if (watchdog := watching.current()) is not None:
        watchdog.begins(f"bad step {step}")


def _bad_weights(state: State) -> list[str]:
    return not_finite(state.model.named_parameters())


def _all_names(ours: list[str]) -> list[str]:
    return sorted({name for names in dist.all_gather_object(ours) for name in names})
