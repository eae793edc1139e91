"""What generation is asked for: texts and conversations from arguments, files and standard input, with settings.

A line of a ``.jsonl`` file is ``{"prompt": ...}``, ``{"messages": [...]}``, or a request as MPT-7B's endpoint on
Azure ML takes it, ``{"input_data": {"input_string": [...], "parameters": {...}}}`` (the model's description in
github.com/Azure/azureml-assets, assets/models/system/mosaicml-mpt-7b).
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llmtrain.errors import UserError
from llmtrain.generation.settings import Settings
from llmtrain.json_text import parse_json

Messages = tuple[dict[str, str], ...]
SHOWN_PROBLEMS = 5
"""Bad lines that a message names; it says how many more there are."""


@dataclass(frozen=True)
class Request:
    """A line: one prompt, or several with the same settings.

    Attributes:
        prompts: texts to continue, or one conversation to answer.
        settings: the command line's, where the line says nothing else.
        fields: the line as it came, which the answer repeats.
        form: which kind of line it was, and so the form of the answer.
        place: what messages call it.
    """

    prompts: tuple[str | Messages, ...]
    settings: Settings
    fields: dict[str, Any] = field(default_factory=dict)
    form: Literal["prompt", "messages", "input_data"] = "prompt"
    place: str = "the prompt"


class Requests:
    """All requests, read anew each time they are gone through, so that a long file takes no memory.

    Attributes:
        sha256: of what they were read from.
        n_prompts: how many texts and conversations there are.
        n: how many requests there are.

    Args:
        texts: prompts, before those of the file.
        file: ``.jsonl``, or any other file with a prompt a line. Empty lines are skipped.
        settings: for all that a line does not say.

    Raises:
        UserError: nothing is there, the file cannot be read, or lines are no requests (with their numbers).
    """

    def __init__(self, texts: Sequence[str], file: Path | None, settings: Settings) -> None:
        self._texts, self._file, self._settings = tuple(texts), file, settings
        # A pipe gives what it has once.
        self._content = file.read_bytes() if file is not None and file.exists() and not file.is_file() else None
        self.n = self.n_prompts = 0
        digest = self._digest()
        problems: list[str] = []
        for item in self._read(digest.update):
            if isinstance(item, UserError):
                problems.append(str(item))
            else:
                self.n += 1
                self.n_prompts += len(item.prompts)
        self.sha256 = digest.hexdigest()
        refuse(problems)
        if not self.n:
            raise UserError("There is no prompt: pass --prompt TEXT, --prompts FILE, or text on standard input.")

    def __iter__(self) -> Iterator[Request]:
        digest = self._digest()
        for item in self._read(digest.update):
            if isinstance(item, UserError):  # it was none when the file was read first
                raise item
            yield item
        if digest.hexdigest() != self.sha256:
            raise UserError(f"{self._file}: it has changed while it was read. Begin anew.")

    def _digest(self) -> "hashlib._Hash":
        """That of the texts; of the file's lines when they have been read."""
        return hashlib.sha256(json.dumps(list(self._texts)).encode())

    def _read(self, seen: Any) -> Iterator[Request | UserError]:
        for text in self._texts:
            yield Request((text,), self._settings, {"prompt": text})
        if self._file is None:
            return
        try:
            with self._file.open("rb") if self._content is None else io.BytesIO(self._content) as lines:
                for number, line in enumerate(lines, start=1):
                    seen(line)
                    if not line.strip():
                        continue
                    place = f"{self._file}, line {number}"
                    try:
                        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                        if self._file.suffix == ".jsonl":
                            yield replace(_request(parse_json(text), self._settings), place=place)
                        else:
                            yield Request((text,), self._settings, {"prompt": text}, place=place)
                    except UnicodeError as error:
                        yield UserError(f"{place}: not UTF-8: {error}")
                    except (ValueError, RecursionError) as error:
                        yield UserError(f"{place}: not JSON: {error}")
                    except UserError as error:
                        yield UserError(f"{place}: {error}")
        except OSError as error:
            raise UserError(f"{self._file}: cannot be read: {error}") from None


def refuse(problems: Sequence[str]) -> None:
    """Name what is wrong, all at once.

    Raises:
        UserError: there are problems.
    """
    if problems:
        more = f"\n(and {len(problems) - SHOWN_PROBLEMS} more)" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError("\n".join(problems[:SHOWN_PROBLEMS]) + more)


def standard_input() -> list[str]:
    """All of standard input, as one prompt; none if it is empty."""
    if sys.stdin.isatty():
        print("Prompt (end with Ctrl-D):", file=sys.stderr)
    text = sys.stdin.read()
    return [text.removesuffix("\n")] if text.strip() else []


def _request(data: Any, defaults: Settings) -> Request:
    """The request that a line of jsonl is."""
    forms = [key for key in ("prompt", "messages", "input_data") if isinstance(data, dict) and key in data]
    if len(forms) != 1:
        raise UserError(
            'expected an object with one of a text `prompt` ({"prompt": "..."}), `messages`, or `input_data`'
            + (f"; this one has {' and '.join(forms)}" if forms else "")
        )
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeError:
        raise UserError("holds half of a surrogate pair (\\ud800-\\udfff), which is no text") from None
    if forms == ["input_data"]:
        return _azure_request(data, defaults)
    settings = defaults.changed(data.get("parameters"))
    if forms == ["messages"]:
        if settings.return_full_text:
            raise UserError("`return_full_text` is for texts, not for `messages`")
        return Request((_messages(data["messages"]),), settings, data, "messages")
    if not isinstance(data["prompt"], str):
        raise UserError('expected a text `prompt`: {"prompt": "..."}')
    return Request((data["prompt"],), settings, data)


def _azure_request(data: dict[str, Any], defaults: Settings) -> Request:
    block = data["input_data"]
    texts = block.get("input_string") if isinstance(block, dict) else None
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError('expected `input_data`: {"input_string": ["...", ...], "parameters": {...}}')
    if unknown := _unknown(block, ("input_string", "parameters")):
        raise UserError(f"input_data has {unknown}; only `input_string` and `parameters` are known")
    # The model card's answer begins with the prompt.
    settings = replace(defaults, return_full_text=True).changed(block.get("parameters"))
    return Request(tuple(texts), settings, data, "input_data")


def _messages(messages: Any) -> Messages:
    good = isinstance(messages, list) and bool(messages)
    for message in messages if good else ():
        good &= isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not good:
        raise UserError('expected `messages`: [{"role": "user", "content": "..."}, ...]')
    if messages[-1]["role"] == "assistant":
        raise UserError("the last of `messages` is the assistant's: there is nothing to answer")
    return tuple(messages)


def _unknown(block: dict[str, Any], known: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in block if key not in known)
