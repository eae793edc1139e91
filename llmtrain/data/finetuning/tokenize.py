"""Examples -> token ids and which of them are trained."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.conversations.messages import BadExample, Chat, Example, PromptResponse, Tokenized
from llmtrain.data.finetuning.encoder import Encoder, Ids
from llmtrain.data.finetuning.jinja import ChatTemplate
from llmtrain.data.finetuning.layout import PROMPT, Layout
from llmtrain.data.finetuning.render import Renderer
from llmtrain.errors import UserError
from llmtrain.tokenizer import fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 2
"""Raise it whenever the ids or the mask of some example change: caches of tokenised examples are found by it."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """An example, ready for a batch."""

    ids: NDArray[np.uint32]
    """(n,), n <= max_seq_len."""
    trained: NDArray[np.bool_]
    """(n,); whether token i is a target, predicted from the tokens before it. The first one never is."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of an example that is prompt, or response, as a whole."""

    turn: int
    """The response's number, or `PROMPT`."""
    ids: Ids | None
    """Of literal text; None where contents come in."""
    parts: tuple[str | int, ...] = ()
    """Ordinary text and numbers of contents, to be joined and tokenised as one text."""


Stretch = tuple[int, Ids]
"""A response's number, or `PROMPT`; and its ids."""


class ExampleTokenizer:
    """Tokenises examples of any kind and marks the tokens that are trained.

    A chat's text is what the tokenizer's chat template makes of it. It is tokenised as a whole, but for a cut at the
    start of each response: that is how the model meets the text when it has to write the response. So the ids are those
    of `apply_chat_template`, save where a token would reach over such a start (or over the end of a response that no
    special token closes); and save that the text of a special token inside a content is tokenised as ordinary text, so
    that no content can close a turn or open one. Such contents are counted; a tokenizer whose ids depend on what stands
    beside a text (SentencePiece's kind) cannot do that, and there such a chat is a `BadExample`.

    A `PromptResponse` is tokenised as llm-foundry does it: two texts one after the other, special tokens in them
    recognised, what the tokenizer puts before a text (a BOS) put before the prompt.

    Args:
        tokenizer: With a chat template, if chats are to be tokenised.
        max_seq_len: Tokens of the longest example.
        target_prompts: Which prompts are trained: `none`, `all`, or `length>=N`: those of at least N tokens. The prompt
            of a turn is all that stands between the response before it and its own.
        target_responses: Which responses are trained: the `last` of each example, or `all`.
        long_examples: Cut what is longer than `max_seq_len` on the right, or drop the example.

    Raises:
        UserError: one of these settings is none of those, or the chat template is not Jinja.
    """

    counts: Counter[str]
    """What was noticed in the examples so far: 'truncated', 'special token text in a content'."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_seq_len: int,
        target_prompts: str = "none",
        target_responses: str = "last",
        long_examples: Literal["truncate", "drop"] = "truncate",
    ) -> None:
        self.max_seq_len = max_seq_len
        self.target_prompts, self._prompt_length = _prompt_target(target_prompts)
        self.target_responses = target_responses.lower()
        if self.target_responses not in ("last", "all"):
            raise UserError(f"target_responses is {target_responses!r}; it can be 'last' or 'all'")
        self.long_examples = long_examples
        self.counts = Counter()
        self.encoder = Encoder(tokenizer)
        self._eos = int(tokenizer.eos_token_id)
        self._size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self._before = _put_before(tokenizer)
        self._fingerprint = fingerprint_of(tokenizer)
        self.template_text = default_template(tokenizer)
        constants = dict(tokenizer.special_tokens_map)
        self._constants = json.dumps(constants, sort_keys=True, default=str)
        self.renderer = None
        if self.template_text is not None:
            self.renderer = Renderer(ChatTemplate(self.template_text, constants), self.encoder.boundary)
        self._pieces: dict[int, tuple[Layout, list[_Piece]]] = {}

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedExample | BadExample]:
        """Tokenise a batch; what cannot be learnt from comes back as the `BadExample` that says why, in its place.

        Raises:
            UserError: there are chats and the tokenizer has no chat template, or one that would train what others say.
        """
        return [self._one(example) for example in examples]

    def identity(self) -> str:
        """A hash (hex) of all that decides over ids and mask: tokenizer, template, settings, this code's version."""
        decisive = {
            "version": _VERSION,
            "tokenizer": self._fingerprint,
            "pipeline": self.encoder.pipeline,
            "before": self._before.tolist(),
            "eos": self._eos,
            "template": self.template_text,
            "constants": self._constants,
            "max_seq_len": self.max_seq_len,
            "target_prompts": self.target_prompts,
            "target_responses": self.target_responses,
            "long_examples": self.long_examples,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _one(self, example: Example) -> TokenizedExample | BadExample:
        try:
            match example:
                case Chat():
                    return self._finish(self._chat(example))
                case PromptResponse():
                    return self._finish(self._prompt_response(example))
                case Tokenized():
                    return self._finish(self._tokenized(example))
        except BadExample as problem:
            return problem
        except UnicodeEncodeError as problem:
            return BadExample("invalid Unicode", str(problem))

    def _chat(self, chat: Chat) -> list[Stretch]:
        if self.renderer is None:
            raise UserError(
                "there are conversations in the data and the tokenizer has no chat template: "
                "name one with tokenizer.chat_template (chatml, dolly, a .jinja file)"
            )
        special = self.encoder.special
        if special is not None and any(special.search(message.content) for message in chat.messages):
            self.counts["special token text in a content"] += 1
            if not self.encoder.separable:  # its text is tokenised as a whole, where such a token would be a real one
                raise BadExample("special token text in a content", "this tokenizer cannot take it for ordinary text")
        layout, contents = self.renderer(chat)
        if self.target_responses == "last" and not layout.responses[-1].trained:
            raise BadExample("nothing to train on", "the last answer stands outside the template's generation blocks")
        if not self.encoder.separable:
            return self._by_places(layout, contents)
        stretches: list[Stretch] = []
        for piece in self._compile(layout):
            ids = piece.ids
            if ids is None:
                text = "".join([part if isinstance(part, str) else contents[part] for part in piece.parts])
                ids = self.encoder.plain([text])[0]
            stretches.append((piece.turn, ids))
        return stretches

    def _compile(self, layout: Layout) -> list[_Piece]:
        """The layout with its literal text tokenised."""
        found = self._pieces.get(id(layout))
        if found is not None:
            return found[1]
        pieces: list[_Piece] = []
        for run in layout.runs:
            ordinary: list[str | int] = []
            for part in run.parts:
                if isinstance(part, int):
                    ordinary.append(part)
                    continue
                for text, is_special in self.encoder.split(part):
                    if not is_special:
                        ordinary.append(text)
                        continue
                    pieces += self._ordinary(run.turn, ordinary)
                    pieces.append(_Piece(run.turn, self.encoder.marked([text])[0]))
                    ordinary = []
            pieces += self._ordinary(run.turn, ordinary)
        if not layout.closed:
            turn = len(layout.responses) - 1 if layout.responses[-1].trained else PROMPT
            pieces.append(_Piece(turn, np.array([self._eos], dtype=np.uint32)))
        pieces = _merge(pieces)
        if layout.strips:  # the renderer keeps it; one that fits a single chat is thrown away
            self._pieces[id(layout)] = (layout, pieces)
        return pieces

    def _ordinary(self, turn: int, parts: list[str | int]) -> list[_Piece]:
        if all(isinstance(part, str) for part in parts):
            text = "".join(map(str, parts))
            return [_Piece(turn, self.encoder.plain([text])[0])] if text else []
        return [_Piece(turn, None, tuple(parts))]

    def _by_places(self, layout: Layout, contents: list[str]) -> list[Stretch]:
        """For tokenizers whose ids depend on what is beside a text: the mask comes from the tokens' places in it."""
        ids, places = self.encoder.with_places([layout.fill(contents)])[0]
        turns = np.full(len(ids), PROMPT)
        start = 0
        for run in layout.runs:
            end = start + sum(len(part if isinstance(part, str) else contents[part]) for part in run.parts)
            if run.turn != PROMPT:  # a token that reaches over the start is part of the prompt
                turns[(places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > start)] = run.turn
            start = end
        borders = np.flatnonzero(np.diff(turns)) + 1
        stretches: list[Stretch] = [
            (int(turns[first]), part)
            for first, part in zip([0, *borders.tolist()], np.split(ids, borders), strict=True)
            if len(part)
        ]
        if not layout.closed and layout.responses[-1].trained:
            stretches.append((len(layout.responses) - 1, np.array([self._eos], dtype=np.uint32)))
        return stretches

    def _prompt_response(self, example: PromptResponse) -> list[Stretch]:
        prompt, response = self.encoder.marked([example.prompt, example.response])
        return [(PROMPT, np.concatenate([self._before, prompt])), (0, self._ended(response))]

    def _tokenized(self, example: Tokenized) -> list[Stretch]:
        stretches: list[Stretch] = []
        for turn, (prompt, response) in enumerate(example.turns):
            stretches += [(PROMPT, self._checked(prompt)), (turn, self._checked(response))]
        if not stretches:
            raise BadExample("no turns")
        turn, last = stretches.pop()
        return [*stretches, (turn, self._ended(last))]

    def _checked(self, ids: Any) -> Ids:
        numbers = np.asarray(ids)
        if numbers.ndim != 1 or numbers.size == 0:
            raise BadExample("empty turn", f"tokens of shape {numbers.shape}")
        if numbers.dtype.kind not in "iu":
            raise BadExample("not token ids", f"{numbers.dtype} where integers are expected")
        if numbers.min() < 0 or numbers.max() >= self._size:
            worst = numbers.min() if numbers.min() < 0 else numbers.max()
            raise BadExample("token id out of range", f"{worst} is not in [0, {self._size})")
        return numbers.astype(np.uint32)

    def _ended(self, response: Ids) -> Ids:
        """With the end-of-text token, once."""
        if len(response) and response[-1] == self._eos:
            return response
        return np.append(response, np.uint32(self._eos))

    def _finish(self, stretches: list[Stretch]) -> TokenizedExample:
        turns = np.array([turn for turn, _ in stretches])
        lengths = [len(ids) for _, ids in stretches]
        wanted = turns == turns.max() if self.target_responses == "last" else turns != PROMPT
        wanted &= turns != PROMPT
        if self._prompt_length is not None:
            wanted |= self._long_prompts(turns, np.array(lengths), self._prompt_length)
        ids = np.concatenate([ids for _, ids in stretches])
        trained = np.repeat(wanted, lengths)
        trained[:1] = False
        if len(ids) > self.max_seq_len:
            if self.long_examples == "drop":
                raise BadExample("too long", f"{len(ids)} tokens, max_seq_len is {self.max_seq_len}")
            self.counts["truncated"] += 1
            ids, trained = ids[: self.max_seq_len], trained[: self.max_seq_len]
        if not trained.any():
            raise BadExample("nothing to train on", f"no trained token among the first {len(ids)}")
        return TokenizedExample(ids, trained)

    @staticmethod
    def _long_prompts(turns: NDArray[np.int64], lengths: NDArray[np.int64], at_least: int) -> NDArray[np.bool_]:
        """Which stretches are prompts of that length; stretches side by side are one prompt."""
        prompt = turns == PROMPT
        group = np.cumsum(~prompt)
        sizes = np.bincount(group, weights=lengths * prompt)
        # What follows the last response is nobody's prompt.
        long: NDArray[np.bool_] = prompt & (sizes[group] >= at_least) & (group < group[-1])
        return long


def default_template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """The Jinja text of a tokenizer's chat template; of several, the one named `default`.

    Raises:
        UserError: it has several, none of which is the default.
    """
    found = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"the tokenizer has the chat templates {', '.join(sorted(found))} and no default: "
                "name one with tokenizer.chat_template"
            )
        found = found["default"]
    return found or None


def _prompt_target(target: str) -> tuple[str, int | None]:
    """The setting in one spelling, and the shortest prompt that is trained (None: no prompt is)."""
    target = target.lower()
    if target in ("none", "all"):
        return target, None if target == "none" else 0
    number = re.fullmatch(r"length>=([0-9]+)", target)
    if number is None or int(number[1]) == 0:
        raise UserError(f"target_prompts is {target!r}; it can be 'none', 'all' or 'length>=N' with N of at least 1")
    return target, int(number[1])


def _put_before(tokenizer: "PreTrainedTokenizerFast") -> Ids:
    """What the tokenizer's post-processor puts before a text: a BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
    return np.array(whole[: starts[0]] if starts else [], dtype=np.uint32)


def _merge(pieces: list[_Piece]) -> list[_Piece]:
    """Literal ids side by side, of one turn, made one."""
    merged: list[_Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.ids is not None and piece.ids is not None and last.turn == piece.turn:
            merged[-1] = _Piece(piece.turn, np.concatenate([last.ids, piece.ids]))
        else:
            merged.append(piece)
    return merged
