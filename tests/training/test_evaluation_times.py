"""When evaluations come: at intervals and at the last step, each once, and the last one before its step is saved."""

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from composer import Event, Time, Timestamp

from llmtrain.training.evaluation_times import EvaluationTimes


def evaluated(interval: str, length: str, *, steps: int = 12, epoch: int = 6) -> list[tuple[str, int]]:
    """Where a run evaluates: event and step."""
    times, now, found, end = EvaluationTimes(interval), Timestamp(), [], Time.from_timestring(length)
    before = now

    def ask(event: Event) -> None:
        unit = end.unit
        state: Any = SimpleNamespace(
            timestamp=now, previous_timestamp=before, get_elapsed_duration=lambda: now.get(unit) / end, max_duration=end
        )
        if times(state, event):
            found.append((event.name, int(now.batch)))

    for step in range(1, steps + 1):
        before, now = now, now.to_next_batch(samples=1, tokens=1, duration=datetime.timedelta(seconds=1))
        ask(Event.BATCH_END)
        if step % epoch == 0:
            before, now = now, now.to_next_epoch()
            ask(Event.EPOCH_END)
    ask(Event.FIT_END)
    return found


@pytest.mark.parametrize(
    ("interval", "length", "expected"),
    [
        ("5ba", "12ba", [("BATCH_END", 5), ("BATCH_END", 10), ("BATCH_END", 12)]),
        ("4ba", "12ba", [("BATCH_END", 4), ("BATCH_END", 8), ("BATCH_END", 12)]),
        ("1ep", "12ba", [("EPOCH_END", 6), ("BATCH_END", 12)]),  # and not at the epoch's end again
        ("1ep", "2ep", [("EPOCH_END", 6), ("EPOCH_END", 12)]),
        ("5ba", "2ep", [("BATCH_END", 5), ("BATCH_END", 10), ("EPOCH_END", 12)]),
        ("6ba", "2ep", [("BATCH_END", 6), ("BATCH_END", 12)]),
        ("100ba", "12tok", [("BATCH_END", 12)]),
        ("0ba", "12ba", []),
        ("0ep", "2ep", []),
    ],
)
def test_at_each_interval_and_at_the_last_step_once(
    interval: str, length: str, expected: list[tuple[str, int]]
) -> None:
    assert evaluated(interval, length) == expected
