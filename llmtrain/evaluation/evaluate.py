"""Losses of a model on text, at one length of the window."""

from collections.abc import Callable, Iterator, Sequence
from math import nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.data.batch import IGNORE
from llmtrain.errors import UserError
from llmtrain.evaluation.by_position import LossByPosition
from llmtrain.evaluation.by_source import LossBySource
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.tokens import Tokens
from llmtrain.evaluation.windows import at_most, windows
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT

Ids = NDArray[np.int64]

TOKENS_IN_A_BATCH = 16_384
"""Of one forward, when nothing else is said; a longer window is a batch of its own."""


def evaluate(
    model: MPT | HFCausalLM,
    tokens: Tokens,
    length: int,
    *,
    max_tokens: int | None = None,
    batch_tokens: int = TOKENS_IN_A_BATCH,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
    by_source: LossBySource | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> LossByPosition:
    """Loss at each position of windows of `length` tokens. Each token but the first of a piece is predicted once.

    Windows are dealt out to the ranks; sums of losses and numbers of targets are added up in float64, so that the
    result is the same, but for rounding in the model, for any number of ranks and any batch.

    Args:
        model: in evaluation mode.
        tokens: the text.
        length: tokens in a window.
        max_tokens: of the text, from its beginning.
        batch_tokens: of a forward; decides on memory and, but for rounding, on nothing else.
        batch_size: windows in a forward, instead.
        advance: called with the number of targets that are done, on all ranks together.
        by_source: counts the losses of each of `tokens.sources`, too.
        ranks: the processes that share the work; one when left out.
        sharded: the model is sharded over them: all make equally many forwards.

    Raises:
        UserError: the model cannot take so many tokens, or no piece has so many.
    """
    check_length(model, length)
    pieces = at_most(tokens.pieces, max_tokens)
    check_text(pieces, length, fixed=tokens.row_length is not None)
    cut = windows(pieces, length)

    def read(number: int) -> tuple[Ids, Ids]:
        ids = tokens.read(*cut[number])
        return ids, ids

    return add_up(
        model,
        [window.length for window in cut],
        read,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        advance=advance,
        by_source=by_source,
        source_of=lambda number: tokens.sources[cut[number].piece],
        ranks=ranks,
        sharded=sharded,
    )


@torch.no_grad()
def add_up(
    model: MPT | HFCausalLM,
    lengths: Sequence[int],
    read: Callable[[int], tuple[Ids, Ids]],
    *,
    batch_tokens: int = TOKENS_IN_A_BATCH,
    batch_size: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
    by_source: LossBySource | None = None,
    source_of: Callable[[int], str] = lambda number: "",
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> LossByPosition:
    """Losses of rows of any lengths, by position.

    Args:
        model: in evaluation mode.
        lengths: tokens of each row.
        read: number of a row -> its ids and labels, (tokens,) each; IGNORE where there is no target.
        batch_tokens: of a forward, padding included; one row is always taken.
        batch_size: rows in a forward, instead.
        advance: called with the number of tokens that are done but the first of each row, on all ranks together.
        by_source: counts the losses of each source, too.
        source_of: number of a row -> its source.
        ranks: see `evaluate`.
        sharded: see `evaluate`.
    """
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    losses = LossByPosition(device)
    # The longest first: then the ranks' shares are alike, and the rows of a batch, too.
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    left = sum(lengths) - len(lengths)
    mine = list(_batches([order[i] for i in ranks.deal(len(order))], lengths, batch_tokens, batch_size))
    for turn in range(ranks.rounds(len(mine)) if sharded else len(mine)):
        counts = turn < len(mine)  # else the others have more to do, and need this one's part of the model
        batch = mine[turn] if counts else order[-1:]
        rows = [read(number) for number in batch]
        input_ids = _stack([ids for ids, _ in rows], 0).to(device)
        labels = _stack([each for _, each in rows], IGNORE).to(device)
        output = model(input_ids=input_ids, labels=labels, token_losses=True)
        if not counts:
            continue
        losses.add(output.token_losses, labels)
        if by_source is not None:
            numbers = [by_source.names.index(source_of(number)) for number in batch]
            by_source.add(output.token_losses, labels, torch.tensor(numbers, device=device))
        now = min(left, ranks.world * sum(lengths[number] - 1 for number in batch))  # the others' are about alike
        advance(now)
        left -= now
    if by_source is not None:
        by_source.sums = ranks.sum(by_source.sums)
    return losses.over_ranks(ranks.sum, lengths[order[0]])


def n_bytes(tokens: Tokens, pieces: Sequence[int]) -> dict[str, float]:
    """Bytes of UTF-8 that the predicted tokens of each source stand for; NaN where nobody knows.

    Args:
        tokens: the text.
        pieces: tokens of each piece that are evaluated (`at_most`); all but the first of a piece are predicted.
    """
    found: dict[str, float] = {}
    for number, size in enumerate(pieces):
        of_piece = tokens.n_bytes(number, 1, size)
        source = tokens.sources[number]
        found[source] = found.get(source, 0.0) + (nan if of_piece is None else of_piece)
    return found


def n_targets(pieces: Sequence[int]) -> int:
    """Tokens that are predicted, whatever the length of the window."""
    return sum(size - 1 for size in pieces)


def check_length(model: MPT | HFCausalLM, length: int) -> None:
    """Refuse windows that a model cannot read.

    Raises:
        UserError: it has learned positions, and fewer.
    """
    if length < 2:
        raise UserError(f"max_seq_len {length}: a window needs at least 2 tokens, one to read and one to predict")
    if isinstance(model, MPT):
        limit = model.config.max_seq_len if model.config.uses_learned_positions else None
    else:
        limit = None if positions_are_computed(model) else getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"max_seq_len {length:,}: the model has {limit:,} learned positions and none beyond them. Evaluate it at "
            f"up to {limit:,} tokens; a model with ALiBi has no such limit"
        )


def check_text(pieces: Sequence[int], length: int, *, fixed: bool = True) -> None:
    """Refuse windows that no text fills.

    Args:
        pieces: tokens of each.
        length: of a window.
        fixed: the text is rows of shards, of which windows are made; documents may be shorter than a window.

    Raises:
        UserError: no piece has so many tokens, or, of documents, none has two.
    """
    longest = max(pieces, default=0)
    if longest < (length if fixed else 2):
        raise UserError(
            f"max_seq_len {length:,}: the longest text to evaluate on has {longest:,} tokens. "
            "Give longer text (--data), more of it (--max-tokens), or a smaller --max-seq-len"
        )


def note_on_length(model: MPT | HFCausalLM, length: int) -> str | None:
    """What is worth knowing about a length that is beyond the training length; None when nothing is."""
    trained = getattr(model.config, "max_seq_len", None) or getattr(model.config, "max_position_embeddings", None)
    if trained is None or length <= trained:
        return None
    if isinstance(model, MPT) and model.config.attn_config.alibi:
        return f"{length:,} tokens: beyond the {trained:,} of training; ALiBi extrapolates."
    return (
        f"{length:,} tokens: beyond the {trained:,} of training. Rotary positions were not trained there; expect a "
        "loss that rises behind them."
    )


def positions_are_computed(model: HFCausalLM) -> bool:
    """Whether a model of transformers computes its positions (rotary, ALiBi), or looks them up in a table."""
    names = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "alibi")
    return any(getattr(model.config, name, None) is not None for name in names)


def _batches(
    order: Sequence[int], lengths: Sequence[int], batch_tokens: int, batch_size: int | None
) -> Iterator[list[int]]:
    """Rows, the longest first, in batches of at most `batch_tokens` tokens, or one row, or of `batch_size`."""
    batch: list[int] = []
    for number in order:
        room = (len(batch) + 1) * lengths[batch[0]] <= batch_tokens if batch else True
        if batch and not (room if batch_size is None else len(batch) < batch_size):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _stack(rows: Sequence[Ids], padding: int) -> Tensor:
    """Rows of any length as (batch, T) int64, padded on the right: causality hides what stands there."""
    stacked = torch.full((len(rows), max(map(len, rows))), padding, dtype=torch.int64)
    for row, target in zip(rows, stacked, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return stacked
