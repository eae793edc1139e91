"""What a person watching a run sees: one line every few steps, with rate and time left."""

import sys
import time
from typing import Any

from composer import Event, Logger, State, TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import dist
from composer.utils.misc import create_interval_scheduler

from llmtrain.training.loss_curve import TRAIN_LOSS

_NAMES = {
    "LanguageCrossEntropy": "loss",
    "LanguagePerplexity": "perplexity",
    "TokenAccuracy": "accuracy",
    "InContextLearningLMAccuracy": "accuracy",
    "InContextLearningMultipleChoiceAccuracy": "accuracy",
    "InContextLearningGenerationExactMatchAccuracy": "exact match",
    "InContextLearningLMExpectedCalibrationError": "calibration error",
    "InContextLearningMCExpectedCalibrationError": "calibration error",
}


class Console(LoggerDestination):  # type: ignore[misc]
    """Prints progress on rank 0.

    Composer's console logger prints each metric on a line of its own; its progress bar garbles log files.

    Args:
        interval: Composer time string (`1ba`, `10ba`, `1ep`), how often a line is printed.
    """

    def __init__(self, interval: str | int) -> None:
        self._is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events={Event.BATCH_END})
        self._enabled = dist.get_global_rank() == 0
        self._metrics: dict[str, Any] = {}
        # (clock, value) at the last printed line and at the start, for the rate and the time left
        self._since: tuple[float, int] = (time.monotonic(), 0)
        self._started: tuple[float, float] = (time.monotonic(), 0.0)
        self._evaluating: tuple[float, str] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._enabled:
            self._metrics.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._since = (time.monotonic(), int(state.timestamp.token))
        self._started = (time.monotonic(), self._share_done(state))

    def eval_start(self, state: State, logger: Logger) -> None:
        self._evaluating = (time.monotonic(), str(state.dataloader_label))

    def eval_end(self, state: State, logger: Logger) -> None:
        if not self._enabled or self._evaluating is None:
            return
        started, label = self._evaluating
        seconds = time.monotonic() - started
        # As logged: computing a metric here would be a collective call on one rank.
        values = [
            f"{_NAMES.get(name, name)} {self._metrics[key]:.4g}"
            for name in sorted(state.eval_metrics.get(label, {}))
            if (key := f"metrics/{label}/{name}") in self._metrics
        ]
        _say(f"{label:<10}  step {int(state.timestamp.batch)}  {'  '.join(values)}  ({seconds:.1f} s)")
        # An evaluation is no training time.
        self._since = (self._since[0] + seconds, self._since[1])
        self._started = (self._started[0] + seconds, self._started[1])

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._enabled and self._is_due(state, Event.BATCH_END):
            self._print_progress(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._enabled and self._is_due(state, Event.EPOCH_END):
            self._print_progress(state)

    def _print_progress(self, state: State) -> None:
        step, tokens, now = int(state.timestamp.batch), int(state.timestamp.token), time.monotonic()
        share = self._share_done(state)
        rate = (tokens - self._since[1]) / max(now - self._since[0], 1e-9)
        done_here = share - self._started[1]
        left = (now - self._started[0]) / done_here * (1 - share) if done_here > 0 else None
        self._since = (now, tokens)
        line = [f"train       step {step}", f"{share:4.0%}"]
        if TRAIN_LOSS in self._metrics:
            line.append(f"loss {self._metrics[TRAIN_LOSS]:.4f}")
        if state.schedulers:
            line.append(f"lr {state.schedulers[0].get_last_lr()[0]:.2e}")
        line.append(f"{_quantity(rate)} tokens/s")
        if (mfu := self._metrics.get("throughput/device/mfu")) is not None:
            line.append(f"MFU {mfu:.1%}")
        if left is not None:
            line.append(f"{_duration(left)} left")
        _say("  ".join(line))

    @staticmethod
    def _share_done(state: State) -> float:
        end, timestamp = state.max_duration, state.timestamp
        if end is not None and end.unit == TimeUnit.EPOCH and state.dataloader_len:
            # Composer counts whole epochs only.
            done = int(timestamp.epoch) + int(timestamp.batch_in_epoch) / int(state.dataloader_len)
            return done / int(end.value)
        elapsed = state.get_elapsed_duration()
        return float(elapsed) if elapsed is not None else 0.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quantity(value: float) -> str:
    """1234567 -> 1.23M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or d h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days}d {clock}" if days else clock
