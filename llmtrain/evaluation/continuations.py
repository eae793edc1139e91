"""How likely a model finds continuations of contexts, and whether it would have chosen them: what tasks ask for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.data.batch import IGNORE
from llmtrain.errors import UserError
from llmtrain.evaluation.evaluate import positions_are_computed
from llmtrain.evaluation.ranks import Ranks
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT

Batch = TypeVar("Batch")
Result = TypeVar("Result")
Advance = Callable[[int], None]


class Request(NamedTuple):
    """Tokens to score, and those before them."""

    context: Sequence[int]
    """At least one token."""
    continuation: Sequence[int]
    """At least one token."""


class Score(NamedTuple):
    """What a model thinks of a continuation."""

    loglikelihood: float
    """Sum of the logarithms of its tokens' probabilities, natural."""
    greedy: bool
    """Whether each of its tokens had the largest logit."""


class _Whole(NamedTuple):
    """A sequence of which the last tokens are scored, all at once."""

    tokens: tuple[int, ...]
    n_targets: int


@torch.no_grad()  # not inference_mode: what FSDP gathers in there could not be used for training any more
def scores(
    model: MPT | HFCausalLM,
    requests: Sequence[Request],
    *,
    max_length: int,
    batch_tokens: int,
    ranks: Ranks | None = None,
    sharded: bool = False,
    advance: Advance = lambda n: None,
) -> list[Score]:
    """Score continuations. Several ranks share the batches, which are the same for any number of ranks.

    What is asked twice is computed once, and continuations of one token after the same context (the letters of multiple
    choice) are read off one forward.

    Args:
        model: in evaluation mode.
        requests: the same on all ranks.
        max_length: most tokens that the model is given at once; longer contexts lose their beginning, as in
            lm-evaluation-harness. (The last token of a continuation is never given, so one more than these count.)
        batch_tokens: of a forward, padding included; a longer sequence is a batch of its own.
        ranks: who shares the work.
        sharded: whether the ranks share the model as well, and must make equally many forwards.
        advance: called with the number of tokens of each batch that this rank has computed.

    Returns:
        One for each request, on all ranks.

    Raises:
        UserError: a continuation has no tokens, or more than the model can be given.
    """
    ranks = ranks or Ranks()
    wholes, endings = _plan(requests, max_length, learned_positions(model))
    found: list[Score] = [Score(0.0, True)] * len(requests)

    def add(number: int, part: Score) -> None:
        found[number] = Score(found[number].loglikelihood + part.loglikelihood, found[number].greedy and part.greedy)

    whole_keys = list(wholes)
    batches = in_batches([len(key.tokens) for key in whole_keys], batch_tokens)
    for batch, parts in zip(
        batches,
        dealt(batches, lambda rows: _score_wholes(model, [whole_keys[i] for i in rows], advance), ranks, sharded),
        strict=True,
    ):
        for i, part in zip(batch, parts, strict=True):
            for number in wholes[whole_keys[i]]:
                add(number, part)
    ending_keys = list(endings)
    batches = in_batches([len(key) for key in ending_keys], batch_tokens)
    for batch, each in zip(
        batches,
        dealt(
            batches,
            lambda rows: _score_endings(model, {ending_keys[i]: list(endings[ending_keys[i]]) for i in rows}, advance),
            ranks,
            sharded,
        ),
        strict=True,
    ):
        for i, of_tokens in zip(batch, each, strict=True):
            for part, numbers in zip(of_tokens, endings[ending_keys[i]].values(), strict=True):
                for number in numbers:
                    add(number, part)
    return found


def learned_positions(model: MPT | HFCausalLM) -> int | None:
    """How many positions a model has learned; None where it computes them for any number of tokens."""
    if isinstance(model, MPT):
        return model.config.max_seq_len if model.config.uses_learned_positions else None
    return None if positions_are_computed(model) else getattr(model.config, "max_position_embeddings", None)


def in_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of sequences, the longest first and those of like length together, at most `batch_tokens` padded tokens.

    The same on all ranks, and for any number of them.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def dealt(
    batches: Sequence[Batch], forward: Callable[[Batch], Result], ranks: Ranks, sharded: bool = False
) -> list[Result]:
    """What `forward` gives for each batch, on all ranks; each computes its share."""
    if not batches:
        return []
    mine = [batches[i] for i in ranks.deal(len(batches))]
    rounds = ranks.rounds(len(mine)) if sharded else 0  # asked first: the ranks' forwards talk to each other as well
    done = [forward(batch) for batch in mine]
    for _ in range(rounds - len(mine)):  # the others' forwards need this rank's part of the weights
        forward(batches[-1])
    return ranks.gather(done)


def _plan(
    requests: Sequence[Request], max_length: int, positions: int | None
) -> tuple[dict[_Whole, list[int]], dict[tuple[int, ...], dict[int, list[int]]]]:
    """Which sequences are computed for which requests.

    Returns:
        Whole sequences -> numbers of requests; and inputs -> last token -> numbers of requests, where only the last
        logits are needed.
    """
    wholes: dict[_Whole, list[int]] = {}
    endings: dict[tuple[int, ...], dict[int, list[int]]] = {}
    cut: list[tuple[int, ...]] = []
    last_tokens: dict[tuple[int, ...], set[int]] = {}
    for request in requests:
        _check(request, max_length)
        tokens = (*request.context, *request.continuation)[-(max_length + 1) :]
        cut.append(tokens)
        if len(request.continuation) == 1:
            last_tokens.setdefault(tokens[:-1], set()).add(tokens[-1])
    for number, (request, tokens) in enumerate(zip(requests, cut, strict=True)):
        n = len(request.continuation)
        too_long = positions is not None and len(tokens) > positions
        if too_long or (n == 1 and len(last_tokens[tokens[:-1]]) > 1):
            endings.setdefault(tokens[:-1], {}).setdefault(tokens[-1], []).append(number)
            tokens, n = tokens[:-1], n - 1
        if n:
            wholes.setdefault(_Whole(tokens, n), []).append(number)
    return wholes, endings


def _check(request: Request, max_length: int) -> None:
    if not request.continuation:
        raise UserError("A continuation of the task has no token of its own: the tokenizer joins it to its context")
    if len(request.continuation) > max_length:
        raise UserError(
            f"max_length {max_length}: a continuation of the task has {len(request.continuation):,} tokens, more than "
            "the model is given at once. Raise max_length, if the model can take more"
        )


def _score_wholes(model: MPT | HFCausalLM, batch: Sequence[_Whole], advance: Advance) -> list[Score]:
    device = next(model.parameters()).device
    longest = max(len(row.tokens) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for i, (tokens, n) in enumerate(batch):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, len(tokens) - n : len(tokens)] = ids[i, len(tokens) - n : len(tokens)]
    output = model(input_ids=ids.to(device), labels=labels.to(device), token_losses=True)
    losses: list[float] = output.token_losses.double().sum(1).tolist()
    n_correct: list[int] = output.token_correct.sum(1).tolist()
    advance(sum(len(row.tokens) for row in batch))
    return [Score(-loss, n == row.n_targets) for loss, n, row in zip(losses, n_correct, batch, strict=True)]


def _score_endings(
    model: MPT | HFCausalLM, batch: dict[tuple[int, ...], list[int]], advance: Advance
) -> list[list[Score]]:
    """For each inputs -> last tokens: the score of each of these."""
    device = next(model.parameters()).device
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for i, tokens in enumerate(batch):
        ids[i, longest - len(tokens) :] = torch.tensor(tokens)
        seen[i, longest - len(tokens) :] = True
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=seen.to(device), last_logits=True).logits[:, -1]
    best = logits.argmax(-1).tolist()
    logarithms = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    found = []
    for i, last in enumerate(batch.values()):
        values: list[float] = logarithms[i, torch.tensor(last, device=device)].tolist()
        found.append([Score(value, token == best[i]) for value, token in zip(values, last, strict=True)])
    advance(sum(map(len, batch)))
    return found
