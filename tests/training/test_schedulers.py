import math
from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp, TimeUnit
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llmtrain.training.schedulers import SchedulerConfig, build_scheduler, inv_sqrt, units_problem

parse = TypeAdapter(SchedulerConfig).validate_python


def at(batch: int, max_duration: str = "100ba", loader: int = 50) -> SimpleNamespace:
    """The part of Composer's state that schedules read."""
    time = Timestamp(batch=batch, epoch=batch // loader, token=batch * 10, sample=batch * 2)
    return SimpleNamespace(
        timestamp=time, max_duration=Time.from_timestring(max_duration), dataloader_len=Time(loader, "ba")
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "constant_with_warmup", "t_warmup": "10ba", "alpha": 0.5}, {0: 0, 5: 0.25, 10: 0.5, 99: 0.5}),
        ({"name": "cosine_with_warmup", "t_warmup": "10ba", "alpha_f": 0.1}, {5: 0.5, 10: 1, 55: 0.55, 100: 0.1}),
        ({"name": "cosine_with_warmup", "t_warmup": "0.1dur"}, {5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ({"name": "linear_decay_with_warmup", "t_warmup": "10ba", "alpha_f": 0.2}, {5: 0.5, 10: 1, 55: 0.6, 100: 0.2}),
        ({"name": "linear_decay_with_warmup", "t_warmup": 0}, {0: 1, 50: 0.5, 100: 0}),
        ({"name": "inv_sqrt_with_warmup", "t_warmup": "10ba"}, {0: 0, 5: 0.5, 10: 1, 40: 0.5}),
        (
            {"name": "inv_sqrt_with_warmup", "t_warmup": "4ba", "t_scale": "2ba", "t_cooldown": "20ba"},
            {4: 1, 10: 0.5, 80: 1 / math.sqrt(39), 90: 0.5 / math.sqrt(39), 100: 0},
        ),
    ],
)
def test_factors_by_hand(config: dict, expected: dict[int, float]) -> None:
    schedule = build_scheduler(parse(config))
    assert {batch: schedule(at(batch)) for batch in expected} == pytest.approx(expected)


def test_epochs_and_tokens_count_like_batches() -> None:
    in_epochs = build_scheduler(parse({"name": "inv_sqrt_with_warmup", "t_warmup": "10ba", "t_cooldown": "1ep"}))
    in_tokens = build_scheduler(parse({"name": "inv_sqrt_with_warmup", "t_warmup": "100tok", "t_cooldown": "500tok"}))
    in_batches = build_scheduler(parse({"name": "inv_sqrt_with_warmup", "t_warmup": "10ba", "t_cooldown": "50ba"}))
    for batch in (0, 3, 10, 40, 60, 99):
        expected = in_batches(at(batch))
        assert in_epochs(at(batch, "2ep")) == pytest.approx(expected)
        assert in_tokens(at(batch, "1000tok")) == pytest.approx(expected)


def test_extending_an_inv_sqrt_run_does_not_change_its_past() -> None:
    schedule = build_scheduler(parse({"name": "inv_sqrt_with_warmup", "t_warmup": "10ba"}))
    for batch in range(0, 100, 7):
        assert schedule(at(batch, "100ba")) == schedule(at(batch, "5000ba"))


@given(
    now=st.floats(0, 1000), warmup=st.floats(0, 100), scale=st.floats(1, 100), cooldown=st.floats(0, 500),
    floor=st.floats(0, 1), final=st.floats(0, 1),
)  # fmt: skip
def test_inv_sqrt_stays_in_bounds_and_never_rises_after_the_warmup(
    now: float, warmup: float, scale: float, cooldown: float, floor: float, final: float
) -> None:
    times = {"warmup": warmup, "scale": scale, "cooldown": cooldown, "end": 1000.0, "floor": floor, "final": final}
    value = inv_sqrt(now, **times)
    assert 0 <= value <= 1 + 1e-9
    if now >= warmup and final <= floor and now < 990:
        assert inv_sqrt(now + 10, **times) <= value + 1e-9


@pytest.mark.parametrize(
    ("config", "max_duration", "problem"),
    [
        (
            {"name": "cosine_with_warmup", "t_warmup": "10tok"},
            "100ba",
            ("t_warmup", "must be in `ba` or `ep` or `dur`"),
        ),
        ({"name": "cosine_with_warmup", "t_warmup": "10ba"}, "1000tok", ("t_warmup", "must be in `tok` or `dur`")),
        ({"name": "cosine_with_warmup", "t_warmup": "10sp"}, "2ep", ("t_warmup", "`ba` or `ep` or `dur`")),
        ({"name": "cosine_with_warmup", "t_warmup": "1ba", "t_max": "50ba"}, "100ba", ("t_max", "at least that")),
        ({"name": "cosine_with_warmup", "t_warmup": "1ba", "t_max": "0.5dur"}, "100ba", ("t_max", "whole run")),
        (
            {"name": "inv_sqrt_with_warmup", "t_warmup": "1ba", "t_cooldown": "9tok"},
            "100ba",
            ("t_cooldown", "in `ba` or `ep`."),
        ),
    ],
)
def test_units_that_cannot_be_compared_are_named(config: dict, max_duration: str, problem: tuple[str, str]) -> None:
    found = units_problem(parse(config), max_duration)
    assert found is not None
    assert found[0] == problem[0]
    assert problem[1] in found[1]


@pytest.mark.parametrize("max_duration", ["100ba", "2ep", "1000tok", "200sp"])
@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine_with_warmup", "linear_decay_with_warmup"])
@pytest.mark.parametrize("warmup", ["0.1dur", "0ba", "10ba", "100tok", "1ep", "20sp"])
def test_what_units_problem_passes_composer_accepts(name: str, warmup: str, max_duration: str) -> None:
    config = parse({"name": name, "t_warmup": warmup})
    schedule = build_scheduler(config)
    if units_problem(config, max_duration) is None:
        assert 0 <= schedule(at(7, max_duration)) <= 1
    else:
        with pytest.raises(ValueError, match="same units"):
            schedule(at(7, max_duration))


def test_inv_sqrt_refuses_dur() -> None:
    with pytest.raises(ValidationError, match="does not depend on the length of the run"):
        parse({"name": "inv_sqrt_with_warmup", "t_warmup": "0.1dur"})


def test_units_of_composer_are_all_known() -> None:
    from llmtrain.config.durations import UNITS

    assert set(UNITS) == {unit.value for unit in TimeUnit}
