"""Prompts become tokens: special tokens before the preamble only, and the beginning of what is too long is cut off."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.evaluation.icl.config import ICLTaskConfig
from llmtrain.evaluation.icl.prompts import Prompt, with_thoughts
from llmtrain.evaluation.icl.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int32]

THOUGHT_BUFFER = 10
"""Tokens that a generated answer may have beyond the longest one of the file, where a chain of thought comes first."""


@dataclass(frozen=True)
class Pair:
    """A context and what is scored behind it."""

    context: Ids
    continuation: Ids

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Question:
    """One question in tokens."""

    row: Row
    contexts: tuple[Ids, ...]
    """One, or one for each option of a schema task; not cut yet."""
    continuations: tuple[Ids, ...]
    """One, or one for each choice; none for generated answers."""

    def pairs(self, max_seq_len: int) -> Iterator[Pair]:
        """What is scored, one for each choice, none longer than `max_seq_len`."""
        for number in range(max(len(self.contexts), len(self.continuations))):
            end = self.continuations[min(number, len(self.continuations) - 1)]
            context = self.contexts[min(number, len(self.contexts) - 1)]
            yield Pair(last(context, max_seq_len - len(end)), end)


def last(ids: Ids, n: int) -> Ids:
    """The last n tokens."""
    return ids if len(ids) <= n else ids[len(ids) - n :]


class Encoder:
    """Tokenizes prompts.

    Args:
        tokenizer: any of transformers'.

    Attributes:
        prefix_space: continuations begin with a blank. llm-foundry's rule: where ` a` is one token. Byte-level BPE
            (GPT-2, NeoX) has words with the blank before them; sentencepiece adds its own.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self.prefix_space = len(self.ids(" a")) == 1

    def ids(self, text: str, *, special: bool = False) -> Ids:
        """Tokens of a text, with or without those that the tokenizer adds."""
        encoded: Any = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def question(self, prompt: Prompt, max_seq_len: int, label: str) -> Question:
        """A prompt in tokens.

        Raises:
            UserError: a continuation has no token, or leaves no room for one of its context.
        """
        preamble = self.ids(prompt.preamble, special=True)
        if len(preamble) > 1 and preamble[-1] == self.tokenizer.eos_token_id:  # some tokenizers end each text
            preamble = preamble[:-1]
        contexts = []
        for text in prompt.contexts:
            context = np.concatenate([preamble, self.ids(text)])
            contexts.append(context if len(context) else self._beginning())
        ends = tuple(self.ids(text) for text in prompt.continuations)
        for end in ends:
            if not 0 < len(end) < max_seq_len:
                text = "is empty" if not len(end) else f"has {len(end)} tokens, and with a context they do not fit"
                raise UserError(
                    f"{prompt.row.place}: an answer {text} ({label}, max_seq_len {max_seq_len}). Correct the row, or "
                    "raise max_seq_len (icl_seq_len) above it."
                )
        return Question(prompt.row, tuple(contexts), ends)

    def _beginning(self) -> Ids:
        """Before a text without context stands the token with which texts begin: the first token has to be scored."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name)) is not None:
                return np.asarray([token], dtype=np.int32)
        raise UserError("A question without context needs a tokenizer with a token for the beginning or end of a text.")

    def longest_answer(self, task: ICLTaskConfig, rows: Sequence[Row]) -> int:
        """Tokens that an answer may have: those of the longest in the file, and a few more behind a thought."""
        thoughts = any(row.values.get("chain_of_thought") is not None for row in rows)
        longest = 1
        for row in rows:
            for answer in (row.text("answer"), *row.texts("aliases")):
                text = with_thoughts(task, row, answer) if thoughts else answer
                longest = max(longest, len(self.ids(text, special=True)))
        return longest + (THOUGHT_BUFFER if task.cot_delimiter else 0)
