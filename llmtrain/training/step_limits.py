"""How long is too long."""

import statistics
from collections import deque
from typing import Literal

TIMES_MEDIAN = 20
FLOOR = 50.0
"""Where steps are quick, a hang is named within a minute, the ranks' exchange of stacks included; and a store of data
that is down has been tried for forty seconds by then, and has been named itself."""
FLOOR_COMPILED = 600.0
"""A shape that was not seen before is compiled, in a step like any other."""
ENOUGH = 3

Work = Literal["step", "evaluation", "other"]


class StepLimits:
    """Limits for steps and for batches of evaluations, from those that were finished.

    Args:
        fixed: the recipe's `step_limit`.
        patience: for everything else, and before anything is known.
        floor: least limit that is made from a median.
    """

    def __init__(self, fixed: float | None, *, patience: float, floor: float = FLOOR) -> None:
        self.fixed, self.patience, self.floor = fixed, patience, floor
        self._seen: dict[tuple[Work, str], deque[float]] = {}

    def finished(self, work: Work, seconds: float, of: str = "") -> None:
        """One step (or batch of an evaluation) took so long.

        Args:
            work: which of them.
            seconds: it took.
            of: which evaluation; a task's batch is the whole task.
        """
        if work != "other":
            self._seen.setdefault((work, of), deque(maxlen=101)).append(seconds)

    def limit(self, work: Work, of: str = "") -> float:
        """Seconds."""
        if work == "other":
            return self.patience
        if self.fixed is not None:
            return self.fixed
        seen = self._seen.get((work, of))
        if seen is None or len(seen) < ENOUGH:
            return self.patience
        return max(self.floor, TIMES_MEDIAN * statistics.median(seen))
