"""What a stage says of a document."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Drop:
    """The document is left out."""

    reason: str
    """Which rule: documents are counted by it."""
    detail: str = ""
    """What the rule found, for samples."""
    excerpt: str = ""
    """The text that it found; empty for the document's beginning."""


@dataclass(frozen=True)
class Change:
    """The document goes on with another text."""

    text: str
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was replaced, and how often."""
    excerpt: str = ""
    """The text before, around the first change; empty for the document's beginning."""


Verdict = Drop | Change | None
"""None: the document goes on as it is."""
Step = Callable[[str], Verdict]
"""A stage that looks at one document at a time. Its verdict depends on the text alone."""

EXCERPT = 160
"""Characters of a document that a sample shows."""


def around(text: str, start: int, stop: int) -> str:
    """The part of a text that surrounds characters `start` to `stop`, at most `EXCERPT` characters."""
    margin = max(0, EXCERPT - (stop - start)) // 2
    return text[max(0, start - margin) :][:EXCERPT]
