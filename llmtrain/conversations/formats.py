"""A row of any known shape becomes an example, or a `BadExample` that says what is wrong with it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.conversations.messages import BadExample, Chat, Example, Message, PromptResponse, Tokenized
from llmtrain.json_text import parse_json

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
}
"""What `from` says in ShareGPT's conversations -> role."""

_EXPECTED = "messages, conversations, prompt and response (or completion), or turns"


def parse(row: Mapping[str, Any] | Example, *, token_encoding: str = "int64") -> Example:
    """Make an example of a row; keys that are none of these are left alone, a value of None counts as absent.

    - `{messages: [{role, content}, ...]}`
    - `{conversations: [{from, value}, ...]}` as ShareGPT has it
    - `{prompt, response}` or `{prompt, completion}`
    - `{turns: [{input_ids, labels}, ...]}` or `{input_ids, labels}`: token ids, as llm-foundry writes them

    A row with several of them is taken for the first in this order: `turns`, `input_ids`, `messages`, `conversations`,
    `prompt`. Lists may also come as JSON text, text as UTF-8 bytes. An example is checked and returned as it is.

    Args:
        row: what a reader or a preprocessing function gives.
        token_encoding: integer type of token ids that come as bytes.

    Raises:
        BadExample: nothing can be learnt from it.
    """
    if isinstance(row, Chat | PromptResponse | Tokenized):
        return _check_text(row)
    present = {key for key, value in row.items() if value is not None}
    if "turns" in present:
        turns = _listed(row["turns"], "turns")
        return Tokenized(tuple(_turn(turn, f"turn {n}", token_encoding) for n, turn in enumerate(turns, 1)))
    if {"input_ids", "labels"} <= present:
        return Tokenized((_turn(row, "the row", token_encoding),))
    for key in ("messages", "conversations"):
        if key in present:
            turns = _listed(row[key], key)
            return Chat(tuple(_message(turn, f"turn {n}") for n, turn in enumerate(turns, 1)))
    responses = sorted({"response", "completion"} & present)
    if "prompt" in present and responses:
        if len(responses) > 1:
            raise BadExample("ambiguous keys", "both 'response' and 'completion' are there")
        return PromptResponse(text_of(row["prompt"], "prompt"), text_of(row[responses[0]], responses[0]))
    found = ", ".join(sorted(map(str, present))) or "nothing"
    raise BadExample("missing keys", f"expected {_EXPECTED}; the row has {found}")


def text_of(value: object, name: str) -> str:
    """A value as text: a string, UTF-8 bytes, or a list of parts `{"type": "text", "text": ...}`, which are joined.

    Args:
        value: from a row.
        name: what it is, for the message.

    Raises:
        BadExample: it is something else, or not Unicode.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise BadExample("invalid UTF-8", f"{name}: byte {problem.start} (0x{value[problem.start]:02x})") from None
    if isinstance(value, str):
        _check_unicode(value, name)
        return value
    if _is_list(value):
        return "".join(_part(part, name) for part in value)  # type: ignore[attr-defined]
    raise BadExample("non-string content", f"{name} is {_shown(value)}")


def column(row: Mapping[str, Any], name: str) -> str:
    """The text in a column of a row.

    Raises:
        BadExample: there is no such column, or it holds no text.
    """
    if row.get(name) is None:
        found = ", ".join(str(key) for key, value in row.items() if value is not None) or "nothing"
        raise BadExample("missing keys", f"no {name!r}; the row has {found}")
    return text_of(row[name], name)


def _part(part: object, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and part.get("text") is not None:
        return text_of(part["text"], name)
    raise BadExample("non-string content", f"{name} has a part that is no text: {_shown(part)}")


def _message(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadExample("malformed turn", f"{where} is {_shown(turn)}, not an object with role and content")
    role, content = turn.get("role"), turn.get("content")
    if role is None and turn.get("from") is not None:
        said = turn["from"]
        content = turn.get("value")
        role = SHAREGPT_ROLES.get(said.lower(), said) if isinstance(said, str) else said
    if role is None:
        found = ", ".join(map(str, turn)) or "nothing"
        raise BadExample("malformed turn", f"{where} has {found}; expected role and content, or from and value")
    if not isinstance(role, str):
        raise BadExample("unknown role", f"{where}: {_shown(role)}")
    return Message(role, text_of(content, f"{where} ({role})"))


def _turn(turn: object, where: str, token_encoding: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if not isinstance(turn, Mapping) or turn.get("input_ids") is None or turn.get("labels") is None:
        raise BadExample("malformed turn", f"{where} is {_shown(turn)}, not an object with input_ids and labels")
    ids, labels = (_ids(turn[key], f"{where}: {key}", token_encoding) for key in ("input_ids", "labels"))
    return ids, labels


def _ids(value: object, name: str, token_encoding: str) -> NDArray[np.int64]:
    try:
        if isinstance(value, bytes):
            array = np.frombuffer(value, np.dtype(token_encoding).newbyteorder("<"))
        else:
            array = np.asarray(value)
    except ValueError as problem:  # a length that is no multiple, or a ragged list
        raise BadExample("malformed token ids", f"{name}: {problem}") from None
    if array.size == 0:
        raise BadExample("empty turn", f"{name} is empty")
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise BadExample("malformed token ids", f"{name}: expected a list of ids, found {_shown(value)}")
    return array.astype(np.int64)


def _listed(value: object, key: str) -> Sequence[Any]:
    if isinstance(value, str | bytes):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            raise BadExample("malformed turn", f"{key} is text, and not JSON: {_shown(value)}") from None
    if not _is_list(value):
        raise BadExample("malformed turn", f"{key} is {_shown(value)}, not a list")
    if len(value) == 0:  # type: ignore[arg-type]
        raise BadExample("no turns", f"{key} is empty")
    return value  # type: ignore[return-value]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _check_text(example: Example) -> Example:
    if isinstance(example, Chat):
        for number, message in enumerate(example.messages, 1):
            _check_unicode(message.content, f"turn {number} ({message.role})")
    elif isinstance(example, PromptResponse):
        _check_unicode(example.prompt, "prompt")
        _check_unicode(example.response, "response")
    return example


def _check_unicode(text: str, name: str) -> None:
    """JSON can spell what UTF-8, and so no tokenizer, can hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        detail = f"{name} holds half a surrogate pair (character {problem.start})"
        raise BadExample("invalid UTF-8", detail) from None


def _shown(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
