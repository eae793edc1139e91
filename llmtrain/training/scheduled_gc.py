"""Python's garbage collector, in step on all ranks."""

import gc

from composer import Callback, Logger, State


class ScheduledGC(Callback):  # type: ignore[misc]
    """Switches automatic collection off and collects every so many batches.

    A rank that collects makes all others wait at the next collective, and each rank does so at another step; collecting
    at the same step costs the pause once.

    Args:
        batch_interval: Batches between full collections.
        gen_1_batch_interval: Batches between collections of the young generations; None does none.
        eval_keep_disabled: Keep automatic collection off during evaluation.
    """

    def __init__(
        self, batch_interval: int = 1000, gen_1_batch_interval: int | None = None, eval_keep_disabled: bool = False
    ) -> None:
        self.batch_interval = batch_interval
        self.gen_1_batch_interval = gen_1_batch_interval
        self.eval_keep_disabled = eval_keep_disabled
        self._was_enabled = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Takes over from Python."""
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Collects when it is time."""
        batch = state.timestamp.batch.value
        if batch % self.batch_interval == 0:
            gc.collect()
        elif self.gen_1_batch_interval is not None and batch % self.gen_1_batch_interval == 0:
            gc.collect(1)

    def eval_start(self, state: State, logger: Logger) -> None:
        """Collects, and gives evaluation its automatic collection back."""
        gc.collect()
        if self._was_enabled and not self.eval_keep_disabled:
            gc.enable()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Takes over again."""
        gc.disable()
        gc.collect()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Hands back to Python."""
        self._restore()

    def close(self, state: State, logger: Logger) -> None:
        """Hands back to Python, also when the run failed."""
        self._restore()

    def _restore(self) -> None:
        if self._was_enabled:
            gc.enable()
