"""A row of a dataset, before anything is known about its shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.conversations.messages import BadExample


@dataclass(frozen=True, slots=True)
class Row:
    """A row, or what is wrong with it."""

    place: str
    """Where it is, for messages: `data/x.jsonl, line 12`."""
    number: int
    """The line or row number that `place` says: lines count from 1, rows of tables and datasets from 0."""
    data: Mapping[str, Any] | None
    """Column -> value; None when the row cannot be read."""
    problem: BadExample | None
    """Why it cannot be read; None when it can."""
