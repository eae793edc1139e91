"""Chat templates by name, file or text: what `tokenizer.chat_template` of a recipe stands for."""

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from llmtrain.errors import UserError

NAMED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "dolly": (),
    }
)
"""Templates that come with llmtrain, with the special tokens that each one needs."""

_DEFAULT_SYSTEM = re.compile(r"^\{%- set default_system = .* -%\}$", re.MULTILINE)


def template_text(chat_template: str, system_prompt: str | None = None) -> str:
    """The Jinja text of a template.

    Args:
        chat_template: A name in `NAMED`, the path of a `.jinja` file, or Jinja text.
        system_prompt: What a named template says as system turn where a conversation has none. It becomes part of
            the text, so whoever has the tokenizer has it.

    Raises:
        UserError: there is no such template or file, or the text is not Jinja.
    """
    if chat_template in NAMED:
        text = (resources.files("llmtrain") / "chat_templates" / f"{chat_template}.jinja").read_text(encoding="utf-8")
        if system_prompt is not None:
            literal = json.dumps(system_prompt, ensure_ascii=False)  # its escapes are Jinja's, too
            text = _DEFAULT_SYSTEM.sub(lambda _: f"{{%- set default_system = {literal} -%}}", text, count=1)
        return text
    if system_prompt is not None:
        raise UserError(
            f"tokenizer.system_prompt is written into a named template ({', '.join(NAMED)}); "
            f"tokenizer.chat_template is a template of its own: write the system turn there"
        )
    if "{%" in chat_template or "{{" in chat_template:
        _check_syntax(chat_template, "tokenizer.chat_template")
        return chat_template
    if chat_template.endswith(".jinja"):
        path = Path(chat_template).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(
                f"tokenizer.chat_template: {path} (from {Path.cwd()}) cannot be read: {problem}"
            ) from problem
        _check_syntax(text, str(path))
        return text
    raise UserError(
        f"tokenizer.chat_template: {chat_template!r} is neither a named template ({', '.join(NAMED)}), nor a path that "
        "ends in .jinja, nor Jinja text"
    )


def needed_tokens(chat_template: str | None) -> tuple[str, ...]:
    """Special tokens that the tokenizer must have for a template: those of a named one; none for any other."""
    return NAMED.get(chat_template, ()) if chat_template is not None else ()


def _check_syntax(text: str, where: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag `{% generation %}` of transformers, as far as syntax goes."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, loopcontrols]).parse(text)  # parsed, never rendered
    except TemplateSyntaxError as problem:
        raise UserError(f"{where} is not a Jinja template: line {problem.lineno}: {problem.message}") from problem
