"""How long is too long."""

import statistics
from collections import deque
from typing import Literal

TIMES_MEDIAN = 20
FLOOR = 60.0
FLOOR_COMPILED = 600.0
"""A shape that was not seen before is compiled, in a step like any other."""
ENOUGH = 3

Work = Literal["step", "evaluation", "other"]


class StepLimits:
    """Limits for steps and for batches of evaluations, from those that were finished.

    Args:
        fixed: the recipe's `step_limit`.
        patience: `dist_timeout`: for everything else, and before anything is known.
        floor: least limit that is made from a median.
    """

    def __init__(self, fixed: float | None, *, patience: float, floor: float = FLOOR) -> None:
        self.fixed, self.patience, self.floor = fixed, patience, floor
        self._seen: dict[Work, deque[float]] = {"step": deque(maxlen=101), "evaluation": deque(maxlen=101)}

    def finished(self, work: Work, seconds: float) -> None:
        """One step (or batch of an evaluation) took so long."""
        if work in self._seen:
            self._seen[work].append(seconds)

    def limit(self, work: Work) -> float:
        """Seconds."""
        if work == "other":
            return self.patience
        if self.fixed is not None:
            return self.fixed
        seen = self._seen[work]
        if len(seen) < ENOUGH:
            return self.patience
        return max(self.floor, TIMES_MEDIAN * statistics.median(seen))
