"""What a fine-tuning example is, whatever dataset it came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class BadExample(ValueError):
    """A row that nothing can be learnt from: it is dropped and counted, or ends the run under `strict: true`.

    Args:
        reason: a short category, the same for every row with this fault ("empty turn"): counts are kept by it.
        detail: what is wrong with this row, for the message.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadExample"], tuple[str, str]]:
        """Pickled by its parts: the default would give the whole message to `reason`."""
        return BadExample, (self.reason, self.detail)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str
    """The text, as it stands in the data: not stripped."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; a chat template renders it.

    Raises:
        BadExample: a role is unknown; a content is empty or white space; two turns in a row have one role; a
            system turn is not the first; there is no user or no assistant turn; the last one is not the assistant's.
    """

    messages: tuple[Message, ...]
    """The turns, in order."""

    def __post_init__(self) -> None:
        _check(self.messages)


@dataclass(frozen=True, slots=True)
class PromptResponse:
    """A prompt and its response: plain text, tokenised one after the other, without a template.

    Raises:
        BadExample: one of the two is empty, or white space alone.
    """

    prompt: str
    response: str

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("response", self.response)):
            if not text.strip():
                raise BadExample("empty turn", f"the {name} is empty")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """An example that is tokenised already: llm-foundry's `turns`."""

    turns: tuple[tuple[Sequence[int] | Any, Sequence[int] | Any], ...]
    """Of each turn the ids of the prompt, (n,), and of the response, (m,): lists or integer arrays."""


Example = Chat | PromptResponse | Tokenized


def _check(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise BadExample("no turns", "the conversation is empty")
    previous = None
    for number, message in enumerate(messages, 1):
        where = f"turn {number} ({message.role})"
        if message.role not in ROLES:
            raise BadExample("unknown role", f"turn {number}: {message.role!r} is none of {', '.join(ROLES)}")
        if not message.content.strip():
            raise BadExample("empty turn", where)
        if message.role == previous:
            raise BadExample("duplicate role", f"{where} has the role of the turn before it")
        if message.role == "system" and number > 1:
            raise BadExample("system turn not first", where)
        previous = message.role
    roles = {message.role for message in messages}
    for role in ("user", "assistant"):
        if role not in roles:
            raise BadExample(f"no {role} turn", f"the roles are {', '.join(message.role for message in messages)}")
    if previous != "assistant":
        raise BadExample("wrong last role", f"the last turn is the {previous}'s; the assistant's has to be")
