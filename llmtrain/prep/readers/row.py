"""What the readers of all formats give."""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """A text as a file holds it."""

    position: int
    """Of the row in its file: byte or number, 0 for a whole file."""
    text: str | Callable[[], Iterator[str]]
    """The text, or what gives a long one in parts, and is known to be good to its end."""
    n_bytes: int
    """Length of the text in UTF-8."""
    place: str
    """File and byte or row, for messages."""


def utf8_length(text: str) -> int:
    """Length in bytes.

    Raises:
        UnicodeEncodeError: the text holds half a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    return len(text) if text.isascii() else len(text.encode())
