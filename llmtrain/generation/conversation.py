"""A conversation: its messages, the token ids of its rendering, and text that appears as tokens come."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def render(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Mapping[str, str]]) -> str:
    """The text that the model continues with the assistant's next turn.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so the model was not trained on "
            "conversations. Continue text with `llmtrain generate`, or fine-tune it on conversations "
            "(train_loader.name: finetuning; tokenizer.chat_template: chatml)."
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as problem:  # jinja2's errors, and whatever the template raises
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"The chat template refuses this conversation ({roles}): {problem}") from None


def encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Token ids of a rendering: the template has written what special tokens there are."""
    # Not verbose: transformers would warn of texts longer than the training length, which a model may well take.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


class Conversation:
    """Messages that grow turn by turn.

    Attributes:
        messages: as chat templates take them, `{"role": ..., "content": ...}`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Starts over; the system prompt stays."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._text, self._ids = "", list[int]()  # the last rendering with the answer to it

    def ask(self, text: str) -> list[int]:
        """The ids of the whole conversation with a new turn of the user, which becomes part of it with `answer`.

        As long as the template only appends, the ids of earlier turns stay what they were, the model's own tokens
        included, so that the decoder's cache holds.

        Raises:
            UserError: no template, or one that refuses the messages.
        """
        self._asked = {"role": "user", "content": text}
        self._rendered = render(self.tokenizer, [*self.messages, self._asked])
        if self._text and self._rendered.startswith(self._text):
            self._prompt = self._ids + encode(self.tokenizer, self._rendered[len(self._text) :])
        else:
            self._prompt = encode(self.tokenizer, self._rendered)
        return self._prompt

    def answer(self, ids: Sequence[int], stops: Sequence[int]) -> str:
        """Adds the last question and the model's answer to it.

        Args:
            ids: What the model wrote, with or without the token that ended it.
            stops: The tokens that end an answer.

        Returns:
            The answer as text.
        """
        said = list(ids[:-1] if ids and ids[-1] in stops else ids)
        text = decode(self.tokenizer, said)
        self.messages += [self._asked, {"role": "assistant", "content": text}]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        if special & set(said):  # the rendering will not have them
            self._text, self._ids = "", []
        else:
            self._text, self._ids = self._rendered + text, self._prompt + said
        return text

    def save(self, file: Path) -> None:
        """Writes `{"messages": [...]}`, which fine-tuning reads; under a temporary name first.

        Raises:
            UserError: it cannot be written there.
        """
        temporary = file.with_name(f".{file.name}.writing")
        try:
            temporary.write_text(
                json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
            temporary.replace(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """The text of tokens, special ones left out, spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """Text that appears token by token, with whole characters only.

    A character of several bytes may be spread over tokens; it is held back until it is complete. Only the last tokens
    are decoded again, so the cost of a token does not grow with the answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """How many of `_ids` were shown already: context for those after them (some tokenizers put a space between)."""

    def push(self, token: int) -> str:
        """The text that is complete with this token, perhaps none."""
        self._ids.append(token)
        before, after = self._decoded()
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def flush(self) -> str:
        """What is left at the end: a character that was never completed."""
        before, after = self._decoded()
        self._ids, self._shown = [], 0
        return after[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        return decode(self._tokenizer, self._ids[: self._shown]), decode(self._tokenizer, self._ids)
