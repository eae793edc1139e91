"""What the readers of all formats give."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from llmtrain.prep.readers.bad_input import BadInput


class Row(NamedTuple):
    """A text as a file holds it."""

    position: int
    """Of the row in its file: byte or number, 0 for a whole file."""
    text: str | Callable[[], Iterator[str]]
    """The text; or what gives a long one in parts, once, and is known to be good to its end."""
    n_bytes: int
    """Length of the text in UTF-8."""
    place: str
    """File and byte or row, for messages."""


class BadRow(ValueError):
    """A row that cannot be read; the message says why, without the place."""


def good_row(position: int, text: str, place: str, bad: BadInput) -> Row | None:
    """A text as a row; None, which `bad` knows of, if it cannot be written as UTF-8."""
    try:
        n_bytes = utf8_length(text)
    except BadRow as problem:
        bad(place, str(problem))
        return None
    if not text:
        bad.found_empty(place)
    return Row(position, text, n_bytes, place)


def utf8_length(text: str) -> int:
    """Length in bytes.

    Raises:
        BadRow: the text holds half a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as problem:
        raise half_surrogate(problem.start) from None


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text of a row.

    Raises:
        BadRow: it has none.
    """
    text = row.get(column)
    if not isinstance(text, str):
        raise not_text(column, type(text)) if column in row else no_column(column, row)
    return text


def half_surrogate(character: int) -> BadRow:
    """For a text that has one at this place."""
    return BadRow(f"holds half a surrogate pair (character {character})")


def no_column(column: str, names: Mapping[str, Any] | list[str]) -> BadRow:
    """For a row or file that has other columns."""
    return BadRow(f"no {column!r}; it has {', '.join(names) or 'nothing'} (set text_column)")


def not_text(column: str, found: type) -> BadRow:
    """For a value of another type."""
    return BadRow(f"{column!r} should be text, found {found.__name__}")
