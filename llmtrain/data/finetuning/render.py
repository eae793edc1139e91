"""A conversation as text, cut into what the model is given and what it has to write.

Which characters are trained is read off the rendering itself. A conversation's roles decide what a template writes
between the contents, so one rendering with a placeholder for each content (cached by the roles) shows where the
contents stand and what stands between them: a `Layout`. A conversation whose own rendering is not the layout filled
with its contents (a template may drop the reasoning of earlier turns) is rendered again with marks in the contents.

A response starts where the generation prompt ends, which is where the model starts to write, and ends with the special
token that closes the turn. `{% generation %}` blocks say both themselves.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmtrain.conversations.messages import BadExample, Chat, Message
from llmtrain.data.finetuning.jinja import ChatTemplate, Span
from llmtrain.errors import UserError

PROMPT = -1
"""The `turn` of a run that no response is in."""

_MARK = 0xF0000  # private use, plane 15: the mark of message n is the character _MARK + n
_STRIPS: tuple[Callable[[str], str], ...] = (str, lambda text: text.strip("\n"), str.strip)


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
    strips: tuple[Callable[[str], str], ...] = ()
    """How the template trims each content; empty where the contents are trimmed already."""

    def fill(self, contents: Sequence[str]) -> str:
        """The text of the layout with these (trimmed) contents."""
        return "".join(part if isinstance(part, str) else contents[part] for run in self.runs for part in run.parts)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a content stands in a text."""

    message: int
    start: int
    end: int


class Renderer:
    """Renders conversations with one template.

    Args:
        template: The tokenizer's.
        special: Matches the tokens that a tokenizer cuts out of text before anything else.
    """

    def __init__(self, template: ChatTemplate, special: re.Pattern[str] | None) -> None:
        self.template = template
        self.special = special
        self._layouts: dict[tuple[str, ...], Layout | BadExample] = {}
        self._tails: dict[tuple[str, ...], tuple[str, str] | None] = {}

    def __call__(self, chat: Chat) -> tuple[Layout, list[str]]:
        """The layout of a conversation and the contents that fill it.

        Raises:
            BadExample: the template refuses the conversation, or loses what the assistant says in it.
            UserError: the template's generation blocks hold what others say.
        """
        layout = self.layout(tuple(message.role for message in chat.messages))
        contents = [strip(m.content) for strip, m in zip(layout.strips, chat.messages, strict=True)]
        text, spans = self.template.render(list(chat.messages))
        if layout.fill(contents) == text:
            return layout, contents
        return self._follow(chat, text, spans, layout)

    def layout(self, roles: tuple[str, ...]) -> Layout:
        """What a template writes around the contents of messages with these roles.

        Raises:
            BadExample: as above.
            UserError: as above.
        """
        if roles not in self._layouts:
            try:
                self._layouts[roles] = self._learn(roles)
            except BadExample as problem:
                self._layouts[roles] = problem
        found = self._layouts[roles]
        if isinstance(found, BadExample):
            raise found
        return found

    def _learn(self, roles: tuple[str, ...]) -> Layout:
        text, spans = self.template.render(_placeholders(roles))
        slots = _find_marks(text, len(roles), width=1)
        padded, _ = self.template.render(_placeholders(roles, before="\n ", after=" \n"))
        strips = _strips(text, slots, padded, len(roles))
        return self._divide(roles, text, slots, spans, strips)

    def _follow(self, chat: Chat, text: str, spans: list[Span], usual: Layout) -> tuple[Layout, list[str]]:
        """The layout of a conversation that the template treats in a way of its own."""
        marked = []
        for number, message in enumerate(chat.messages):
            kept = message.content.rstrip()
            white = message.content[len(kept) :]
            marked.append(Message(message.role, kept + chr(_MARK + number) + white))
        with_marks, _ = self.template.render(marked)
        slots = _find_marks(with_marks, len(marked), width=0)
        if _without(with_marks, len(marked)) != text:
            raise BadExample("not aligned with the chat template", "the template changes the contents of this chat")
        roles = tuple(message.role for message in chat.messages)
        placed, previous = [], 0
        for slot in slots:
            content = chat.messages[slot.message].content
            white = usual.strips[slot.message]("x" + content[len(content.rstrip()) :])[1:]
            end = slot.end + len(white) if text.startswith(white, slot.end) else slot.end
            start = self._start(roles, slot.message, text, previous, end, content, usual)
            placed.append(_Slot(slot.message, start, end))
            previous = end
        layout = self._divide(roles, text, placed, spans, ())
        contents = [""] * len(roles)
        for slot in placed:
            contents[slot.message] = text[slot.start : slot.end]
        return layout, contents

    def _start(
        self, roles: tuple[str, ...], message: int, text: str, previous: int, end: int, content: str, usual: Layout
    ) -> int:
        """Where what is left of a content begins: it is the longest end of the content that stands there."""
        first = previous
        if roles[message] == "assistant":
            tail = self._tail(roles[:message])
            headers = [usual.responses[roles[:message].count("assistant")].before, tail[0] if tail else ""]
            first += max(len(header) for header in [*headers, ""] if text.startswith(header, previous))
        here = text[first:end]
        white = len(here) - len(here.rstrip())
        left = _in_common(here.rstrip()[::-1], content.rstrip()[::-1]) + white
        if roles[message] == "assistant" and left < len(content.strip()) and _squeeze(here) not in _squeeze(content):
            raise BadExample("changed by the chat template", f"what the assistant says in message {message + 1}")
        return end - left

    def _tail(self, prefix: tuple[str, ...]) -> tuple[str, str] | None:
        """What follows the last content of a prompt: with the generation prompt, and without.

        None where the template refuses such a prompt.
        """
        if prefix not in self._tails:
            try:
                self._tails[prefix] = self._learn_tail(prefix)
            except BadExample:
                self._tails[prefix] = None
        return self._tails[prefix]

    def _learn_tail(self, prefix: tuple[str, ...]) -> tuple[str, str] | None:
        if not prefix:
            return None
        tails = []
        for generation_prompt in (True, False):
            text, _ = self.template.render(_placeholders(prefix), generation_prompt=generation_prompt)
            slots = _find_marks(text, len(prefix), width=1)
            tails.append(text[slots[-1].end :] if slots else text)
        return tails[0], tails[1]

    def _divide(
        self,
        roles: tuple[str, ...],
        text: str,
        slots: list[_Slot],
        spans: list[Span],
        strips: tuple[Callable[[str], str], ...],
    ) -> Layout:
        """Cut a text at the ends of its responses."""
        turns = {message: n for n, message in enumerate(m for m, role in enumerate(roles) if role == "assistant")}
        order = [slot.message for slot in slots if slot.message in turns]
        if order != list(turns):
            lost = [turn for message, turn in turns.items() if message not in order]
            what = f"answer {lost[0] + 1} does not appear once" if lost else "the answers change places"
            raise BadExample("lost by the chat template", f"{what} in the rendered text")
        ends = [slot.start for slot in slots[1:]] + [len(text)]
        final, closed = self._final(text, slots, turns)
        cuts: list[tuple[int, int, int]] = _blocks(slots, turns, spans, roles)
        responses: list[Response] = []
        previous = 0
        for slot, following in zip(slots, ends, strict=True):
            if slot.message in turns:
                tail = self._tail(roles[: slot.message])
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
                        marker="" if tail is None else tail[0][_in_common(*tail) :],
                        before=text[previous : slot.start],
                        prompt=None if tail is None else tail[0],
                        trained=not spans or bool(inside),
                    )
                )
            previous = slot.end
        return Layout(_runs(text, slots, cuts), tuple(responses), closed, strips)

    def _final(self, text: str, slots: list[_Slot], turns: dict[int, int]) -> tuple[str, bool]:
        """What ends a response, seen at the last one: up to its special token; if it has none, all that is there."""
        last = max(number for number, slot in enumerate(slots) if slot.message in turns)
        until = slots[last + 1].start if last + 1 < len(slots) else len(text)
        literal = text[slots[last].end : until]
        found = self.special.search(literal) if self.special else None
        return (literal, False) if found is None else (literal[: found.end()], True)


def _response(
    text: str, slot: _Slot, previous: int, following: int, tail: tuple[str, str] | None, final: str
) -> tuple[int, int]:
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


def _in_common(left: str, right: str) -> int:
    """Characters that two texts begin with both."""
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _placeholders(roles: Sequence[str], before: str = "", after: str = "") -> list[Message]:
    return [Message(role, before + chr(_MARK + number) + after) for number, role in enumerate(roles)]


def _find_marks(text: str, count: int, width: int) -> list[_Slot]:
    """The marks that stand once in a text, as slots; width 0 counts positions as if there were no marks."""
    slots = []
    before = 0
    for position, character in enumerate(text):
        if 0 <= (number := ord(character) - _MARK) < count:
            start = position if width else position - before
            slots.append(_Slot(number, start, start + width))
            before += 1
    numbers = [slot.message for slot in slots]
    return [slot for slot in slots if numbers.count(slot.message) == 1]


def _without(text: str, count: int) -> str:
    return text.translate({_MARK + number: None for number in range(count)})


def _strips(text: str, slots: list[_Slot], padded: str, count: int) -> tuple[Callable[[str], str], ...]:
    """How a template trims each content: not, of line ends, or of white space; found by trying what explains `padded`.

    A wrong finding does no harm: each conversation is compared with its own rendering.
    """
    found: list[Callable[[str], str]] = [str] * count
    for slot in slots:
        mark = chr(_MARK + slot.message)
        for strip in _STRIPS:
            here = strip(f"\n {mark} \n")
            around = text[max(0, slot.start - 1) : slot.start] + here + text[slot.end : slot.end + 1]
            if around in padded or (here in padded and _next_to_content(slot, slots)):
                found[slot.message] = strip
                break
    return tuple(found)


def _next_to_content(slot: _Slot, slots: list[_Slot]) -> bool:
    return any(other.end == slot.start or other.start == slot.end for other in slots)


def _blocks(
    slots: list[_Slot], turns: dict[int, int], spans: list[Span], roles: tuple[str, ...]
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


def _runs(text: str, slots: list[_Slot], cuts: list[tuple[int, int, int]]) -> tuple[Run, ...]:
    runs = []
    position = 0
    for start, end, turn in [*cuts, (len(text), len(text), PROMPT)]:
        if position < start:
            runs.append(Run(PROMPT, _parts(text, slots, position, start)))
        if start < end:
            runs.append(Run(turn, _parts(text, slots, start, end)))
        position = end
    return tuple(runs)


def _parts(text: str, slots: list[_Slot], start: int, end: int) -> tuple[str | int, ...]:
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
