"""A prompt, and what a model wrote after it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the other fields of the jsonl object that it came in (an id, for example)."""

    text: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: Prompt
    text: str
    """The new text, without special tokens."""
    tokens: list[int]
    """The new token ids, the end token included if there was one."""
    finished: bool
    """Whether it ended with an end token (False: max_new_tokens ended it)."""

    def as_json(self) -> dict[str, Any]:
        """One line of the output: the input's fields, ``prompt``, ``completion``, ``finish_reason``."""
        reason = "stop" if self.finished else "length"
        return {**self.prompt.fields, "prompt": self.prompt.text, "completion": self.text, "finish_reason": reason}
