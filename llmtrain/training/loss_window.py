"""Is this loss a spike? The median of the last steps says so."""

import statistics
from dataclasses import dataclass
from typing import Any

from llmtrain.training.bad_steps_config import LossSpikeConfig

NORMAL = 1.4826
"""The standard deviation of a normal distribution is so many times its median absolute deviation."""


@dataclass(frozen=True)
class Spike:
    """Steps in a row whose losses lie above the threshold.

    Attributes:
        first: the first of these steps.
        last: the one that has just been seen.
        loss: of the last one.
        median: of the window.
        limit: what the loss is above.
        window: steps that the median was taken over.
    """

    first: int
    last: int
    loss: float
    median: float
    limit: float
    window: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, median {self.median:.4g} of the last {self.window} (limit {self.limit:.4g})"


class LossWindow:
    """The losses of the last steps that were no spike. What it says follows from the losses it was shown, only.

    Args:
        cfg: how many steps, and what is too much.
    """

    def __init__(self, cfg: LossSpikeConfig) -> None:
        self.cfg = cfg
        self._losses: list[float] = []
        self._first: int | None = None
        self._above = 0

    def look(self, step: int, loss: float) -> Spike | None:
        """Show it the loss of the next step (finite; in nats); the spike that this makes, or None."""
        if len(self._losses) < self.cfg.window or loss <= (limit := self._limit()):
            self._losses = [*self._losses, loss][-self.cfg.window :]
            self._first, self._above = None, 0
            return None
        self._above += 1
        first = self._first = step if self._first is None else self._first
        if self._above < self.cfg.patience:
            return None
        return Spike(first, step, loss, statistics.median(self._losses), limit, self.cfg.window)

    def _limit(self) -> float:
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.cfg.threshold * max(NORMAL * deviation, 0.01 * abs(median))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"losses": self._losses, "first": self._first, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stood; where the recipe's window has become shorter, with the last losses."""
        self._losses = [float(loss) for loss in state["losses"]][-self.cfg.window :]
        self._first, self._above = state["first"], int(state["above"])
