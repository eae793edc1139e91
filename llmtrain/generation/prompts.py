"""Prompts from arguments, a text file, a jsonl file or standard input; answers to jsonl."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError


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


def gather_prompts(arguments: Sequence[str], file: Path | None) -> list[Prompt]:
    """All prompts: the arguments, then the file's; standard input, as one prompt, when there are neither.

    Raises:
        UserError: the file is missing or malformed (with its line), or there is nothing at all.
    """
    prompts = [Prompt(text) for text in arguments]
    if file is not None:
        prompts += _read_file(file)
    elif not prompts:
        if sys.stdin.isatty():
            print("Prompt (end with Ctrl-D):", file=sys.stderr)
        text = sys.stdin.read()
        prompts = [Prompt(text.removesuffix("\n"))] if text.strip() else []
    if not prompts:
        raise UserError("There is no prompt: pass --prompt TEXT, --prompts FILE, or text on standard input.")
    return prompts


def write_jsonl(path: Path, completions: Iterable[Completion]) -> None:
    """Write one object a line, under a temporary name first."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for completion in completions:
                file.write(json.dumps(completion.as_json(), ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_file(file: Path) -> list[Prompt]:
    """``.jsonl``: an object with ``prompt`` a line; any other file: a prompt a line. Empty lines are skipped."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            prompts.append(Prompt(line.removesuffix("\r")))
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
            raise UserError(f'{file}, line {number}: expected an object with a text `prompt`: {{"prompt": "..."}}')
        prompts.append(Prompt(data["prompt"], {key: value for key, value in data.items() if key != "prompt"}))
    return prompts
