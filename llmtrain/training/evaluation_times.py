"""When a run evaluates: at each interval, and at its last step before that step is saved.

Composer evaluates a last time after the last checkpoint is written. A run that is killed in that evaluation is complete
when it starts again, so its last result would be missing for ever; and `best_checkpoint` would link too late.
"""

from composer import Event, State
from composer.utils import create_interval_scheduler

from llmtrain.config.durations import parse


class EvaluationTimes:
    """Of one evaluator: whether it is due, as Composer asks it.

    Args:
        interval: Composer time string; a plain number counts epochs, 0 is never.
    """

    def __init__(self, interval: str | int) -> None:
        self._at_interval = create_interval_scheduler(interval, include_end_of_training=False, checkpoint_events=False)
        self._ever = parse(interval).value > 0
        self._evaluated = -1

    def __call__(self, state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        if step == self._evaluated:  # the last step of an epoch: at its own end, not at that of the epoch again
            return False
        done = state.get_elapsed_duration()
        is_end = event in (Event.BATCH_END, Event.EPOCH_END) and done is not None and done >= 1.0
        if not (self._at_interval(state, event) or (is_end and self._ever)):
            return False
        self._evaluated = step
        return True
