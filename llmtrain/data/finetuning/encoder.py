"""Pieces of text -> token ids, by the cheapest way that a tokenizer allows."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.fast_bpe import FastBPE, open_fast

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.uint32]


class Encoder:
    """A tokenizer, as fine-tuning needs it.

    Args:
        tokenizer: A fast one; what is added to it later is not seen.
    """

    special: re.Pattern[str] | None
    """Matches the special tokens."""
    boundary: re.Pattern[str] | None
    """Matches every added token but white space: what is cut out of a text before anything else."""
    separable: bool
    """Whether the ids of a text are those of its parts, cut at special tokens: nothing is put before a part."""
    pipeline: dict[str, Any]
    """What happens to a text before the tokenizer's model sees it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._text = tokenizer.backend_tokenizer.to_str()
        spec = json.loads(self._text)
        self.special = _any_of([token["content"] for token in spec["added_tokens"] if token["special"]])
        self.boundary = _any_of([t["content"] for t in spec["added_tokens"] if t["content"].strip()])
        self.separable = _is_separable(spec)
        self.pipeline = {key: spec[key] for key in ("normalizer", "pre_tokenizer")}

    @cached_property
    def _raw(self) -> "Tokenizer":
        """Opened when it is needed: a run whose examples are tokenised already needs but their name."""
        from tokenizers import Tokenizer

        raw = Tokenizer.from_str(self._text)
        raw.no_truncation()
        raw.no_padding()
        return raw

    @cached_property
    def fast(self) -> FastBPE | None:
        """The tokenizer on tiktoken's core, where that is possible."""
        return open_fast(self._raw) if self.separable else None

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """A text cut at its special tokens; of each part, whether it is one."""
        position = 0
        for found in self.special.finditer(text) if self.special else ():
            if position < found.start():
                yield text[position : found.start()], False
            yield found[0], True
            position = found.end()
        if position < len(text):
            yield text[position:], False

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts in which the spelling of a special token is text like any other.

        Raises:
            UnicodeEncodeError: there is half a surrogate pair; so do the other methods.
        """
        return self._encode(texts, special=False)

    def marked(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts in which the spelling of a special token is that token."""
        return self._encode(texts, special=True)

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        if self.fast is not None:
            return [self.fast.encode(text, special=special) for text in texts]
        _refuse_half_characters(texts)
        self._raw.encode_special_tokens = not special
        found = self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.uint32) for each in found]

    def with_places(self, texts: Sequence[str]) -> list[tuple[Ids, NDArray[np.int64]]]:
        """As `marked`, with the characters [start, end) that each token stands for, (n, 2)."""
        _refuse_half_characters(texts)
        self._raw.encode_special_tokens = False
        found = self._raw.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(each.ids, dtype=np.uint32), np.array(each.offsets, dtype=np.int64).reshape(-1, 2))
            for each in found
        ]


def _refuse_half_characters(texts: Sequence[str]) -> None:
    """Raises UnicodeEncodeError: there is half a surrogate pair; `tokenizers` would speak of a wrong type."""
    for text in texts:
        if not text.isascii():
            text.encode()


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """The longest first, as `tokenizers` prefers them."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _is_separable(spec: dict[str, Any]) -> bool:
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"]):
        return False  # such a token swallows the white space beside it, or depends on its neighbours
    normalizers = _flat(spec["normalizer"], "normalizers")
    steps = _flat(spec["pre_tokenizer"], "pretokenizers")
    return (
        all(step["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase") for step in normalizers)
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in ("ByteLevel", "Split", "Digits") for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
    )


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step[key] for inner in _flat(part, key)] if step["type"] == "Sequence" else [step]
