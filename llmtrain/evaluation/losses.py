"""Loss, perplexity and bits per byte of one model on one set of data, at one length or at several."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from llmtrain.data.config import TextDatasetConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.answers import open_examples
from llmtrain.evaluation.by_position import LossByPosition
from llmtrain.evaluation.by_source import LossBySource, SourceLoss
from llmtrain.evaluation.evaluate import add_up, check_length, check_text, evaluate, n_bytes, n_targets, note_on_length
from llmtrain.evaluation.plan import Data, Plan, TextFiles
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.source import Place, known_tokenizers
from llmtrain.evaluation.text import TextTokens, n_input_bytes
from llmtrain.evaluation.token_bytes import UnknownBytes, bytes_of_ids
from llmtrain.evaluation.tokens import JoinedTokens, ShardTokens, Tokens
from llmtrain.evaluation.windows import at_most
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Measured:
    """What was found on one set of data at one length."""

    label: str | None
    """Of the data."""
    kind: Literal["text", "answers"]
    """What was predicted: every token, or what a fine-tuning loader trains."""
    max_seq_len: int
    """Tokens in a window, or most tokens of an example."""
    losses: LossByPosition
    """Loss at each position."""
    seconds: float
    """How long it took."""
    by_source: dict[str, SourceLoss] = field(default_factory=dict)
    """Loss of each source, where there are several."""
    bytes_of: dict[str, float] = field(default_factory=dict)
    """Bytes that the targets of each source stand for; NaN where nobody knows."""

    @property
    def n_bytes(self) -> int | None:
        """Bytes of all targets; None where they are not known."""
        total = sum(self.bytes_of.values()) if self.bytes_of else math.nan
        return None if math.isnan(total) or not total else int(total)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text: its losses, over ln 2, over the bytes. None if unknown."""
        n = self.n_bytes
        return None if n is None else bits_per_byte(self.losses.loss * self.losses.targets, n)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {} if self.n_bytes is None else {"bits_per_byte": self.bits_per_byte, "bytes": self.n_bytes}
        sources = {}
        for name, one in self.by_source.items():
            of = self.bytes_of.get(name, math.nan)
            more = {} if math.isnan(of) or not of else {"bits_per_byte": bits_per_byte(one.loss * one.targets, of)}
            sources[name] = {**one._asdict(), **more}
        return {
            **({} if self.label is None else {"label": self.label}),
            "kind": self.kind,
            "max_seq_len": self.max_seq_len,
            "loss": self.losses.loss,
            "perplexity": perplexity(self.losses.loss),
            **known,
            "targets": self.losses.targets,
            "seconds": round(self.seconds, 3),
            **({"by_source": sources} if sources else {}),
            "by_position": [b.as_dict() for b in self.losses.curve()],
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(nats: float, n: float) -> float:
    """Sum of losses in nats, as bits per byte of text (the Pile, arXiv:2101.00027, section 3.1)."""
    return nats / math.log(2) / n


class Losses:
    """Measures losses of one model.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        place: where it lies.
        plan: what to do.
        ranks: who shares the work.
        sharded: whether they share the model as well.
        console: progress, and what is worth knowing.
    """

    def __init__(
        self,
        model: MPT | HFCausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        place: Place,
        plan: Plan,
        ranks: Ranks,
        *,
        sharded: bool,
        console: Console,
    ) -> None:
        self.model, self.tokenizer, self.place, self.plan = model, tokenizer, place, plan
        self.ranks, self.sharded, self.console = ranks, sharded, console
        self.rows = vocab_size(model)
        self.names: list[str] = []
        """Where the data lies."""
        self._work: list[Callable[[], list[Measured]]] = []

    def open(self, data: Sequence[Data]) -> None:
        """Open all data, and refuse what cannot be measured before anything is.

        Raises:
            UserError: data is missing, does not fit the model, or is too short.
        """
        for one in data:
            self._work.append(self._answers(one) if one.examples is not None else self._text(one))

    def measure(self) -> list[Measured]:
        """All that was opened."""
        return [found for work in self._work for found in work()]

    def _text(self, data: Data) -> Callable[[], list[Measured]]:
        lengths = sorted(self.plan.lengths)
        limit = self._limit(lengths)
        parts = [self._open(key, part, data.label, limit) for key, part in data.parts.items()]
        tokens = JoinedTokens(parts)
        lengths = lengths or [self._default_length(parts)]
        limit = self._limit(lengths)
        self.names += tokens.names
        pieces = at_most(tokens.pieces, limit)
        for length in lengths:  # all of them before the first is computed
            check_length(self.model, length)
            for part in parts:
                _check_rows(part, length)
            check_text(pieces, length, fixed=tokens.row_length is not None)
            if note := note_on_length(self.model, length):
                self._say(f"note: {note}")
        return lambda: self._measure_text(data.label, tokens, pieces, lengths, limit)

    def _measure_text(
        self, label: str | None, tokens: Tokens, pieces: Sequence[int], lengths: Sequence[int], limit: int | None
    ) -> list[Measured]:
        names = list(dict.fromkeys(tokens.sources))
        bytes_of = n_bytes(tokens, pieces)
        found = []
        for length in lengths:
            by_source = LossBySource(names, self.ranks.device) if len(names) > 1 else None
            start = time.monotonic()
            with self._progress(f"{label or ''} {length:,} tokens".strip(), n_targets(pieces)) as advance:
                losses = evaluate(
                    self.model,
                    tokens,
                    length,
                    max_tokens=limit,
                    batch_tokens=self.plan.batch_tokens,
                    batch_size=self.plan.batch_size,
                    advance=advance,
                    by_source=by_source,
                    ranks=self.ranks,
                    sharded=self.sharded,
                )
            of_each = {} if by_source is None else by_source.results()
            seconds = time.monotonic() - start
            found.append(Measured(label, "text", length, losses, seconds, of_each, bytes_of))
        return found

    def _answers(self, data: Data) -> Callable[[], list[Measured]]:
        assert data.examples is not None
        examples = open_examples(data.examples, self.tokenizer, self.rows).first(self.plan.subset)
        self.names += examples.sources
        check_length(self.model, max(examples.lengths))

        def measure() -> list[Measured]:
            several = len(examples.sources) > 1
            by_source = LossBySource(examples.sources, self.ranks.device) if several else None
            start = time.monotonic()
            total = sum(length - 1 for length in examples.lengths)
            with self._progress(data.label or "answers", total) as advance:
                losses = add_up(
                    self.model,
                    examples.lengths,
                    examples.read,
                    batch_tokens=self.plan.batch_tokens,
                    batch_size=self.plan.batch_size,
                    advance=advance,
                    by_source=by_source,
                    source_of=examples.source_of,
                    ranks=self.ranks,
                    sharded=self.sharded,
                )
            of_each = {} if by_source is None else by_source.results()
            length = data.examples.dataset.max_seq_len if data.examples is not None else 0
            return [Measured(data.label, "answers", length, losses, time.monotonic() - start, of_each)]

        return measure

    def _open(self, key: str, part: TextDatasetConfig | TextFiles, label: str | None, limit: int | None) -> Tokens:
        if isinstance(part, TextFiles):
            with self._progress("reading text", n_input_bytes(part.files, part.column), "bytes") as advance:
                return TextTokens(
                    part.files,
                    self.tokenizer,
                    column=part.column,
                    vocab_size=self.rows,
                    name=label or ", ".join(part.files),
                    max_tokens=limit,
                    advance=advance,
                )
        return ShardTokens(
            part,
            vocab_size=self.rows,
            fingerprints=known_tokenizers(self.place, self.tokenizer),
            key=key,
            bytes_of_ids=self._bytes_of_ids(),
        )

    def _bytes_of_ids(self) -> NDArray[np.int64] | None:
        if not hasattr(self, "_table"):
            self._table: NDArray[np.int64] | None = None
            try:
                self._table = bytes_of_ids(self.tokenizer, max(self.rows, len(self.tokenizer)))
            except UnknownBytes as reason:
                self._say(f"note: no bits per byte on shards: {reason}. On text (--data FILE) they are known")
        return self._table

    def _limit(self, lengths: Sequence[int]) -> int | None:
        """Tokens of the data; a subset is so many windows of the longest length."""
        limits = [limit for limit in (self.plan.max_tokens,) if limit is not None]
        if self.plan.subset is not None and lengths:
            limits.append(1 + self.plan.subset * (max(lengths) - 1))
        return min(limits, default=None)

    def _default_length(self, parts: Sequence[Tokens]) -> int:
        """The length of training, where the run says it; or the rows of shards; or what the model was made for."""
        if self.place.recipe is not None:
            return self.place.recipe.max_seq_len
        rows = [part.row_length for part in parts if part.row_length is not None]
        return rows[0] if rows else min(made_for(self.model) or _LENGTH, _LENGTH)

    def _progress(self, what: str, total: int, unit: Literal["bytes", "tokens"] = "tokens") -> Any:
        if not self.ranks.is_first:
            return nullcontext(_nothing)
        return progress(self.console, what, total, unit)

    def _say(self, line: str) -> None:
        if self.ranks.is_first:
            self.console.print(line, highlight=False, soft_wrap=True)


_LENGTH = 2048
"""Tokens in a window where nothing says how many; at most."""


def _nothing(n: int) -> None:
    """Progress of other ranks is shown by the first."""


def made_for(model: MPT | HFCausalLM) -> int | None:
    """Tokens that a model was made for, as its config says; None where it does not."""
    found = getattr(model.config, "max_seq_len", None) or getattr(model.config, "max_position_embeddings", None)
    return None if found is None else int(found)


def vocab_size(model: MPT | HFCausalLM) -> int:
    """Ids that a model has embeddings for."""
    if isinstance(model, MPT):
        return model.config.vocab_size
    return int(model.hf.get_input_embeddings().weight.shape[0])


def _check_rows(part: Tokens, length: int) -> None:
    if not part.joined and part.row_length is not None and length > part.row_length:
        raise UserError(
            f"max_seq_len {length:,}: the rows of {', '.join(part.names)} have {part.row_length:,} tokens and cannot "
            "be joined: they are of one document each (cut: documents), or were not made by llmtrain prep. Prepare "
            "longer rows"
        )
