"""How many bytes of text each token id stands for, where ids alone tell: with byte-level tokenizers."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class UnknownBytes(ValueError):
    """Of this tokenizer nobody can say it; the message says why."""


def bytes_of_ids(tokenizer: "PreTrainedTokenizerFast", rows: int) -> NDArray[np.int64]:
    """Bytes of UTF-8 that each id decodes to.

    Special tokens (the end of a document) are 0 bytes: they stand for no text. So are ids without a token, which pad a
    vocabulary.

    Args:
        tokenizer: of the ids.
        rows: length of the result, at least the number of ids.

    Returns:
        (rows,).

    Raises:
        UnknownBytes: the bytes of a token depend on where it stands.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    steps = [step["type"] for step in _flat(spec.get("decoder"), "decoders")]
    if model.get("type") != "BPE" or steps != ["ByteLevel"]:
        raise UnknownBytes(f"the tokenizer is not byte-level ({model.get('type')}, decoder {steps or 'none'})")
    if any(step.get("add_prefix_space") for step in _flat(spec.get("pre_tokenizer"), "pretokenizers")):
        raise UnknownBytes("the tokenizer puts a blank before each text (add_prefix_space)")
    found = np.zeros(rows, np.int64)
    for token, number in model["vocab"].items():
        found[number] = len(token)  # a character for each byte
    for token in spec.get("added_tokens", []):
        found[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    return found


def _flat(step: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence of them."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for each in step[inside]:
        yield from _flat(each, inside)


def bytes_of_tokens(text: str, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """How the bytes of a text are divided among its tokens, from where each of them ends in it.

    What a tokenizer passes over (blanks, characters that a normalizer drops) belongs to the token behind it, or to the
    last one. Of a character in several tokens the first has all bytes. The sum is always the bytes of the text.

    Args:
        text: the text, not empty of tokens.
        ends: (tokens,), one behind the last character of each.

    Returns:
        (tokens,).
    """
    if text.isascii():
        places = np.maximum.accumulate(ends)
    else:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        lengths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        places = np.maximum.accumulate(np.concatenate([[0], np.cumsum(lengths)])[ends])
    total = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    places[-1] = total
    return np.diff(places, prepend=0)
