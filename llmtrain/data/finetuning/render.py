"""A conversation as text, cut into what the model is given and what it has to write.

Which characters are trained is read off the rendering itself. A conversation's roles decide what a template writes
between the contents, so one rendering with a placeholder for each content (cached by the roles) shows where the
contents stand and what stands between them: a `Layout`. A conversation whose own rendering is not the layout filled
with its contents (a template may drop the reasoning of earlier turns) is rendered again with marks in the contents.

A response starts where the generation prompt ends, which is where the model starts to write, and ends with the special
token that closes the turn. `{% generation %}` blocks say both themselves.
"""

import re
from collections.abc import Sequence

from llmtrain.conversations.messages import BadExample, Chat, Message
from llmtrain.data.finetuning.jinja import ChatTemplate, Span
from llmtrain.data.finetuning.layout import Layout, Slot, Strip, Tail, divide, in_common

_MARK = 0xF0000  # private use, plane 15: the mark of message n is the character _MARK + n
_STRIPS: tuple[Strip, ...] = (str, lambda text: text.strip("\n"), str.strip)


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
        self._tails: dict[tuple[str, ...], Tail | None] = {}

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
            raise BadExample(found.reason, found.detail)  # a new one: each raise would add to the traceback of the old
        return found

    def _learn(self, roles: tuple[str, ...]) -> Layout:
        text, spans = self.template.render(_placeholders(roles))
        slots = _find_marks(text, len(roles), width=1)
        padded, _ = self.template.render(_placeholders(roles, before="\n ", after=" \n"))
        strips = _strips(text, slots, padded, len(roles))
        return self._divide(text, roles, slots, spans, strips)

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
            placed.append(Slot(slot.message, start, end))
            previous = end
        layout = self._divide(text, roles, placed, spans, ())
        contents = [""] * len(roles)
        for slot in placed:
            contents[slot.message] = text[slot.start : slot.end]
        return layout, contents

    def _divide(
        self,
        text: str,
        roles: tuple[str, ...],
        slots: list[Slot],
        spans: list[Span],
        strips: tuple[Strip, ...],
    ) -> Layout:
        tails = {number: self._tail(roles[:number]) for number, role in enumerate(roles) if role == "assistant"}
        return divide(text, roles, slots, spans, tails=tails, special=self.special, strips=strips)

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
        left = in_common(here.rstrip()[::-1], content.rstrip()[::-1]) + white
        if roles[message] == "assistant" and left < len(content.strip()) and _squeeze(here) not in _squeeze(content):
            raise BadExample("changed by the chat template", f"what the assistant says in message {message + 1}")
        return end - left

    def _tail(self, prefix: tuple[str, ...]) -> Tail | None:
        """What follows the last content of a prompt: with the generation prompt, and without.

        None where the template refuses such a prompt.
        """
        if prefix not in self._tails:
            try:
                self._tails[prefix] = self._learn_tail(prefix)
            except BadExample:
                self._tails[prefix] = None
        return self._tails[prefix]

    def _learn_tail(self, prefix: tuple[str, ...]) -> Tail | None:
        if not prefix:
            return None
        tails = []
        for generation_prompt in (True, False):
            text, _ = self.template.render(_placeholders(prefix), generation_prompt=generation_prompt)
            slots = _find_marks(text, len(prefix), width=1)
            tails.append(text[slots[-1].end :] if slots else text)
        return tails[0], tails[1]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _placeholders(roles: Sequence[str], before: str = "", after: str = "") -> list[Message]:
    return [Message(role, before + chr(_MARK + number) + after) for number, role in enumerate(roles)]


def _find_marks(text: str, count: int, width: int) -> list[Slot]:
    """The marks that stand once in a text, as slots; width 0 counts positions as if there were no marks."""
    slots = []
    before = 0
    for position, character in enumerate(text):
        if 0 <= (number := ord(character) - _MARK) < count:
            start = position if width else position - before
            slots.append(Slot(number, start, start + width))
            before += 1
    numbers = [slot.message for slot in slots]
    return [slot for slot in slots if numbers.count(slot.message) == 1]


def _without(text: str, count: int) -> str:
    return text.translate({_MARK + number: None for number in range(count)})


def _strips(text: str, slots: list[Slot], padded: str, count: int) -> tuple[Strip, ...]:
    """How a template trims each content: not, of line ends, or of white space; found by trying what explains `padded`.

    A wrong finding does no harm: each conversation is compared with its own rendering.
    """
    found: list[Strip] = [str] * count
    for slot in slots:
        mark = chr(_MARK + slot.message)
        for strip in _STRIPS:
            here = strip(f"\n {mark} \n")
            around = text[max(0, slot.start - 1) : slot.start] + here + text[slot.end : slot.end + 1]
            if around in padded or (here in padded and _next_to_content(slot, slots)):
                found[slot.message] = strip
                break
    return tuple(found)


def _next_to_content(slot: Slot, slots: list[Slot]) -> bool:
    return any(other.end == slot.start or other.start == slot.end for other in slots)
