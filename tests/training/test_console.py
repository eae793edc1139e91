import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.training.console import _duration, _quantity


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 1:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@given(st.integers(0, 10**7))
def test_duration_tells_every_second(seconds: int) -> None:
    days, _, clock = _duration(seconds).rpartition("d ")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + int(part)
    assert total + int(days or 0) * 86400 == seconds


@pytest.mark.parametrize(
    ("value", "text"), [(12.34, "12.3"), (999, "999"), (1234, "1.23k"), (5_670_000, "5.67M"), (2e9, "2G")]
)
def test_quantity(value: float, text: str) -> None:
    assert _quantity(value) == text
