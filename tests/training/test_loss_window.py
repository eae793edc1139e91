"""When a loss is a spike."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.training.bad_steps_config import LossSpikeConfig
from llmtrain.training.loss_window import LossWindow, Spike


def cfg(**changes: object) -> LossSpikeConfig:
    return LossSpikeConfig.model_validate({"window": 4, "threshold": 10.0, **changes})


def spikes(window: LossWindow, losses: list[float]) -> list[Spike | None]:
    return [window.look(step, loss) for step, loss in enumerate(losses, 1)]


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    assert spikes(LossWindow(cfg()), [1.0, 100.0, 1.0]) == [None, None, None]


def test_limit_is_a_tenth_above_the_median_of_a_quiet_window_with_threshold_ten() -> None:
    window = LossWindow(cfg())
    found = spikes(window, [2.0, 2.0, 2.0, 2.0, 2.19, 2.21])
    assert found[:5] == [None] * 5
    assert found[5] == Spike(first=6, last=6, loss=2.21, median=2.0, limit=2.2, window=4)


def test_limit_follows_the_deviation_of_a_noisy_window() -> None:
    # median 3, median absolute deviation 1: 3 + 2 * 1.4826
    window = LossWindow(cfg(window=5, threshold=2.0))
    assert spikes(window, [1.0, 2.0, 3.0, 4.0, 5.0, 5.9])[-1] is None
    window = LossWindow(cfg(window=5, threshold=2.0))
    found = spikes(window, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[-1]
    assert found is not None
    assert abs(found.limit - 5.9652) < 1e-9


def test_a_spike_does_not_move_the_window() -> None:
    window = LossWindow(cfg())
    found = spikes(window, [2.0] * 4 + [9.0] * 20)
    assert all(spike is not None and spike.median == 2.0 for spike in found[4:])
    assert [spike.first for spike in found[4:] if spike] == [5] * 20  # one row of steps


def test_patience_is_steps_in_a_row_and_the_first_of_them_is_the_beginning() -> None:
    window = LossWindow(cfg(patience=3))
    found = spikes(window, [2.0] * 4 + [9.0, 9.0, 2.0, 9.0, 9.0, 8.0])
    assert found[:9] == [None] * 9
    last = found[9]
    assert last is not None
    assert (last.first, last.last, last.loss) == (8, 10, 8.0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(1, 3))
def test_a_resume_decides_as_if_nothing_had_happened(seed: int, at: int, patience: int) -> None:
    number = random.Random(seed)
    losses = [number.gauss(2.0, 0.1) + (3.0 if number.random() < 0.2 else 0.0) for _ in range(60)]
    settings = cfg(window=8, patience=patience, threshold=5.0)
    whole = spikes(LossWindow(settings), losses)
    before, after = LossWindow(settings), LossWindow(settings)
    first = [before.look(step, loss) for step, loss in enumerate(losses[:at], 1)]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + [after.look(step, loss) for step, loss in enumerate(losses[at:], at + 1)] == whole


def test_a_shorter_window_takes_the_last_losses() -> None:
    window = LossWindow(cfg(window=8))
    spikes(window, [float(loss) for loss in range(1, 9)])
    shorter = LossWindow(cfg(window=4))
    shorter.load_state_dict(window.state_dict())
    assert shorter.state_dict()["losses"] == [5.0, 6.0, 7.0, 8.0]
