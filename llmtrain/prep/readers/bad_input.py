"""What cannot be read: named, and then fatal or counted."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from llmtrain.errors import UserError

_KEPT = 10


class BadInput:
    """Takes note of every row and file that cannot be read, and of empty ones.

    Args:
        on_error: `fail` raises UserError at the first; `skip` counts them and remembers the first ones.
    """

    def __init__(self, on_error: Literal["fail", "skip"]) -> None:
        self.on_error = on_error
        self.counts = 0
        """Rows and files that were left out. A file that broke off is one, whatever was in the rest of it."""
        self.first: list[tuple[str, str]] = []
        """Place and reason of the first ones."""
        self.empty = 0
        """Documents without a character, and files without a row: no error, but more of them than expected are."""
        self.first_empty: list[str] = []
        """Where the first of those are."""

    def __call__(self, place: str, reason: str) -> None:
        """Something that cannot be read.

        Raises:
            UserError: under `fail`.
        """
        if self.on_error == "fail":
            raise UserError(f"{place}: {reason}. Mend or exclude it; on_error: skip leaves out and counts what is bad")
        self.counts += 1
        if len(self.first) < _KEPT:
            self.first.append((place, reason))

    def found_empty(self, place: str) -> None:
        """A document without a character, or a file without a row."""
        self.empty += 1
        if len(self.first_empty) < _KEPT:
            self.first_empty.append(place)

    def as_dict(self) -> dict[str, Any]:
        """The counts and places, for JSON."""
        first = [list(item) for item in self.first]
        return {"bad": self.counts, "first_bad": first, "empty": self.empty, "first_empty": self.first_empty}

    @classmethod
    def joined(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """What several readers noted (`as_dict`), in this order."""
        whole = cls("skip")
        for part in parts:
            whole.counts += part["bad"]
            whole.empty += part["empty"]
            whole.first += [(place, reason) for place, reason in part["first_bad"]][: _KEPT - len(whole.first)]
            whole.first_empty += part["first_empty"][: _KEPT - len(whole.first_empty)]
        return whole
