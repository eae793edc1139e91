"""What a chat template writes around the contents of a conversation, and which of it a response is."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmtrain.conversations.messages import BadExample
from llmtrain.data.finetuning.jinja import Span
from llmtrain.errors import UserError

PROMPT = -1
"""The `turn` of a run that no response is in."""

Strip = Callable[[str], str]
"""How a template trims a content."""

Tail = tuple[str, str]
"""What follows the last content of a prompt: with the generation prompt, and without it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of a rendered text that is response as a whole, or prompt as a whole."""

    turn: int
    """Which response: 0 for that to the first assistant message, ...; or `PROMPT`."""
    parts: tuple[str | int, ...]
    """Literal text of the template, and numbers of contents."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a template writes around an assistant's content."""

    lead: str
    """Between the generation prompt and the content; the model has to write it."""
    close: str
    """After the content, up to the end of the response."""
    marker: str
    """What the generation prompt adds at this place ('' if nothing)."""
    before: str
    """All that stands between the content before and this one."""
    prompt: str | None
    """The same, as the generation prompt has it; None where the template refuses to make one."""
    trained: bool
    """False: the content stands outside the template's generation blocks."""


@dataclass(frozen=True)
class Layout:
    """The parts of a rendering, in order."""

    runs: tuple[Run, ...]
    responses: tuple[Response, ...]
    closed: bool
    """Whether a special token closes the last response; if not, the end-of-text token has to."""
    strips: tuple[Strip, ...] = ()
    """How the template trims each content; empty where the contents are trimmed already."""

    def fill(self, contents: Sequence[str]) -> str:
        """The text of the layout with these (trimmed) contents."""
        return "".join(part if isinstance(part, str) else contents[part] for run in self.runs for part in run.parts)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a content stands in a text."""

    message: int
    start: int
    end: int


def divide(
    text: str,
    roles: tuple[str, ...],
    slots: list[Slot],
    spans: list[Span],
    *,
    tails: Mapping[int, Tail | None],
    special: re.Pattern[str] | None,
    strips: tuple[Strip, ...] = (),
) -> Layout:
    """Cut a rendered text at the ends of its responses.

    Args:
        text: A whole conversation.
        roles: Of its messages.
        slots: Where their contents stand in the text, in the text's order.
        spans: The template's generation blocks, if it has any.
        tails: Of each assistant message what `Tail` says.
        special: Matches the tokens that a tokenizer cuts out of text before anything else.
        strips: As the layout is to have them.

    Raises:
        BadExample: what the assistant says is not in the text, or in another order.
        UserError: a generation block holds what others say.
    """
    turns = {message: n for n, message in enumerate(m for m, role in enumerate(roles) if role == "assistant")}
    order = [slot.message for slot in slots if slot.message in turns]
    if order != list(turns):
        lost = [turn for message, turn in turns.items() if message not in order]
        what = f"answer {lost[0] + 1} does not appear once" if lost else "the answers change places"
        raise BadExample("lost by the chat template", f"{what} in the rendered text")
    ends = [slot.start for slot in slots[1:]] + [len(text)]
    final, closed = _final(text, slots, turns, special)
    cuts: list[tuple[int, int, int]] = _blocks(slots, turns, spans, roles)
    responses: list[Response] = []
    previous = 0
    for slot, following in zip(slots, ends, strict=True):
        if slot.message in turns:
            tail = tails[slot.message]
            if spans:
                inside = [cut for cut in cuts if cut[0] <= slot.start and slot.end <= cut[1]]
                start, end, _ = inside[0] if inside else (slot.start, slot.end, PROMPT)
            else:
                start, end = _response(text, slot, previous, following, tail, final)
                cuts.append((start, end, turns[slot.message]))
            responses.append(
                Response(
                    lead=text[start : slot.start],
                    close=text[slot.end : end],
                    marker="" if tail is None else tail[0][in_common(*tail) :],
                    before=text[previous : slot.start],
                    prompt=None if tail is None else tail[0],
                    trained=not spans or bool(inside),
                )
            )
        previous = slot.end
    return Layout(_runs(text, slots, cuts), tuple(responses), closed, strips)


def _final(text: str, slots: list[Slot], turns: Mapping[int, int], special: re.Pattern[str] | None) -> tuple[str, bool]:
    """What ends a response, seen at the last one: up to its special token; if it has none, all that is there."""
    last = max(number for number, slot in enumerate(slots) if slot.message in turns)
    until = slots[last + 1].start if last + 1 < len(slots) else len(text)
    literal = text[slots[last].end : until]
    found = special.search(literal) if special else None
    return (literal, False) if found is None else (literal[: found.end()], True)


def _response(text: str, slot: Slot, previous: int, following: int, tail: Tail | None, final: str) -> tuple[int, int]:
    """Where a response starts and ends, from what stands around its content."""
    start = slot.start
    if tail is not None and text.startswith(tail[0], previous):
        lead = text[previous + len(tail[0]) : slot.start]
        # Without a generation prompt what comes between is a role marker, unless it is white space.
        if tail[0] != tail[1] or not lead.strip():
            start = min(start, previous + len(tail[0]))
    end = slot.end
    if text.startswith(final, end) and end + len(final) <= following:
        end += len(final)
    return start, end


def in_common(left: str, right: str) -> int:
    """Characters that two texts begin with both."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _blocks(
    slots: list[Slot], turns: dict[int, int], spans: list[Span], roles: tuple[str, ...]
) -> list[tuple[int, int, int]]:
    """Generation blocks with the response that each belongs to: start, end, turn."""
    cuts = []
    for start, end in spans:
        inside = [slot.message for slot in slots if start < slot.end and slot.start < end]
        owners = [message for message in inside if message in turns]
        strangers = [message for message in inside if message not in owners[:1]]
        if strangers:
            raise UserError(
                f"the chat template would train the {roles[strangers[0]]}'s text: message {strangers[0] + 1} of "
                f"{len(roles)} ({', '.join(roles)}) stands in a generation block that is not its own. Move "
                "{% generation %} and {% endgeneration %} so that they hold what one assistant message says"
            )
        if not owners:  # a block of literal text, say the end of the turn: it goes with the content before it
            owners = [slot.message for slot in slots if slot.message in turns and slot.end <= start][-1:]
            owners = owners or [min(turns)]
        cuts.append((start, end, turns[owners[0]]))
    return cuts


def _runs(text: str, slots: list[Slot], cuts: list[tuple[int, int, int]]) -> tuple[Run, ...]:
    runs = []
    position = 0
    for start, end, turn in [*cuts, (len(text), len(text), PROMPT)]:
        if position < start:
            runs.append(Run(PROMPT, _parts(text, slots, position, start)))
        if start < end:
            runs.append(Run(turn, _parts(text, slots, start, end)))
        position = end
    return tuple(runs)


def _parts(text: str, slots: list[Slot], start: int, end: int) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    for slot in slots:
        if start <= slot.start and slot.end <= end:
            if start < slot.start:
                parts.append(text[start : slot.start])
            parts.append(slot.message)
            start = slot.end
    if start < end:
        parts.append(text[start:end])
    return tuple(parts)
