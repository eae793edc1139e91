import pytest
from composer.core import Time
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from llmtrain.config.durations import BatchesOrEpochs, Duration, Interval, RunLength, Span, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000ba", "1000ba"),
        (" 2 ep ", "2ep"),
        (3, "3ep"),
        ("3", "3ep"),
        ("2e9tok", "2000000000tok"),
        ("1_000ba", "1000ba"),
        ("0.5dur", "0.5dur"),
        ("1.0ba", "1ba"),
        ("134217728000tok", "134217728000tok"),
    ],
)
def test_good_spans(text: str | int, expected: str) -> None:
    assert str(parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10x", "such as `1000ba`"),
        ("ba", "such as `1000ba`"),
        ("", "such as `1000ba`"),
        (None, "such as `1000ba`"),
        (True, "such as `1000ba`"),
        (1.5, "such as `1000ba`"),
        ("1.5ep", "Epochs come in whole numbers"),
        ("1.5dur", "at most `1dur`"),
        ("-3ba", "not negative"),
        ("1e999ba", "not negative"),
        ("1-2ba", "such as `1000ba`"),
    ],
)
def test_bad_spans(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)  # type: ignore[arg-type]


@given(st.integers(0, 10**15), st.sampled_from(["ep", "ba", "sp", "tok"]))
def test_composer_reads_what_is_written(value: int, unit: str) -> None:
    assert Time.from_timestring(str(Duration(value, unit))) == Time(value, unit)


@given(st.floats(0, 1), st.sampled_from([RunLength, Interval, Span, BatchesOrEpochs]))
def test_a_checked_span_stays_itself(part: float, kind: object) -> None:
    adapter = TypeAdapter(kind)
    try:
        once = adapter.validate_python(f"{part}dur")
    except ValidationError:
        return
    assert adapter.validate_python(once) == once


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (RunLength, "0.5dur", "cannot stand here"),
        (RunLength, "0ba", "greater than 0"),
        (Interval, "5sec", "cannot stand here"),
        (BatchesOrEpochs, "5tok", "cannot stand here. Units: `ep`"),
    ],
)
def test_places_take_their_own_units(kind: object, text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(kind).validate_python(text)
    assert TypeAdapter(Span).validate_python("0ba") == "0ba"
