"""Spans of training time as they are written in recipes: `10ep`, `1000ba`, `2e9tok`, `0.5dur`."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema

Unit = Literal["ep", "ba", "sp", "tok", "dur", "sec", "iter"]

UNITS: dict[str, str] = {
    "ep": "epochs",
    "ba": "batches",
    "sp": "samples",
    "tok": "tokens",
    "dur": "part of the run, up to 1",
    "sec": "seconds",
    "iter": "iterations",
}

_PATTERN = re.compile(rf"\s*([-+0-9._eE]+?)\s*({'|'.join(get_args(Unit))})\s*")


@dataclass(frozen=True)
class Duration:
    """A number and its unit."""

    value: float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.value:g}dur" if self.unit == "dur" else f"{int(self.value)}{self.unit}"


def parse(text: str | int, units: tuple[str, ...] = get_args(Unit)) -> Duration:
    """Parse a span of time; a plain whole number counts epochs, as in Composer.

    Raises:
        ValueError: With what was expected.
    """
    expected = f"Expected a number and a unit, such as `1000ba`. Units: {_list(units)}."
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(expected)
    match = _PATTERN.fullmatch(f"{text}ep" if isinstance(text, int) or text.strip().isdigit() else text)
    if match is None:
        raise ValueError(expected)
    try:
        value = float(match[1].replace("_", ""))
    except ValueError:
        raise ValueError(expected) from None
    unit: Unit = match[2]  # type: ignore[assignment]
    if unit not in units:
        raise ValueError(f"`{unit}` ({UNITS[unit]}) cannot stand here. Units: {_list(units)}.")
    if not 0 <= value < math.inf:
        raise ValueError("Expected a span of time that is not negative.")
    if unit == "dur" and value > 1:
        raise ValueError("`dur` is a part of the whole run: at most `1dur`.")
    if unit != "dur" and value != int(value):
        raise ValueError(f"{UNITS[unit].capitalize()} come in whole numbers.")
    return Duration(value, unit)


def _list(units: tuple[str, ...]) -> str:
    return ", ".join(f"`{unit}` ({UNITS[unit]})" for unit in units)


def _checker(units: tuple[str, ...], *, positive: bool) -> BeforeValidator:
    def check(value: Any) -> str:
        duration = parse(value, units)
        if positive and duration.value == 0:
            raise ValueError("Expected a span of time greater than 0.")
        return str(duration)

    return BeforeValidator(check)


_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "pattern": rf"^\s*[-+0-9._eE]+\s*({'|'.join(get_args(Unit))})?\s*$"},
            {"type": "integer"},
        ]
    }
)

RunLength = Annotated[str, _checker(("ep", "ba", "sp", "tok"), positive=True), _SCHEMA]
"""How long a run lasts; a plain number counts epochs."""

Interval = Annotated[str, _checker(("ep", "ba", "sp", "tok", "dur"), positive=True), _SCHEMA]
"""How often something happens; a plain number counts epochs."""

Span = Annotated[str, _checker(("ep", "ba", "sp", "tok", "dur"), positive=False), _SCHEMA]
"""A part of a run, possibly empty (a warm-up); a plain number counts epochs."""

BatchesOrEpochs = Annotated[str, _checker(("ep", "ba"), positive=True), _SCHEMA]
"""A span in batches or epochs; a plain number counts epochs."""
