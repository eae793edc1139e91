"""Chat templates rendered as transformers renders them, with the places of `{% generation %}` blocks."""

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtrain.conversations.messages import BadExample, Message
from llmtrain.errors import UserError

# Marks around the text of a generation block; private-use characters of plane 16; data that has them is refused.
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"

Span = tuple[int, int]
"""Characters [start, end) of a rendered text."""


class ChatTemplate:
    """A compiled template.

    transformers' own functions differ from version to version in what they give away about generation blocks, and cost
    more than the rendering itself; `mask_check` compares the two on a run's first examples.

    Args:
        text: Jinja, with what transformers adds to it (`raise_exception`, `strftime_now`, `tojson`, loop controls,
            `{% generation %}`).
        special_tokens: Names and texts that a template may use (`bos_token`, `eos_token`, ...).

    Raises:
        UserError: `text` is not Jinja.
    """

    def __init__(self, text: str, special_tokens: dict[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except TemplateSyntaxError as problem:
            raise UserError(
                f"the tokenizer's chat template is not Jinja: line {problem.lineno}: {problem.message}"
            ) from problem
        self._constants = {"tools": None, "documents": None, **special_tokens}
        self.text = text

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of a conversation, and the generation blocks in it.

        Raises:
            BadExample: the template refuses this conversation, or a content holds the marks of generation blocks.
        """
        if any(mark in message.content for message in messages for mark in (_OPEN, _CLOSE)):
            raise BadExample("private-use characters", "U+10FFF0 and U+10FFF1 mark generation blocks here")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=generation_prompt, **self._constants)
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as problem:
            roles = ", ".join(message.role for message in messages)
            raise BadExample("refused by the chat template", f"{problem} (roles: {roles})") from problem
        return (text, []) if _OPEN not in text else _without_marks(text)


def _without_marks(text: str) -> tuple[str, list[Span]]:
    plain: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for number, between in enumerate(text.split(_OPEN)):
        inside, *after = between.split(_CLOSE, 1) if number else ["", between]
        start = length
        for part in (inside, *after):
            plain.append(part)
            length += len(part)
        if inside:
            spans.append((start, start + len(inside)))
    return "".join(plain), spans


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the text inside is what the model is to write."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)
