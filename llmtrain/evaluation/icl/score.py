"""Log-likelihoods of continuations, and generated answers: what tasks ask of a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.data.batch import IGNORE
from llmtrain.evaluation.icl.encode import Ids, Pair
from llmtrain.evaluation.icl.metrics import Scored
from llmtrain.evaluation.ranks import Ranks
from llmtrain.generation.decoder import decoder_for
from llmtrain.generation.generate import Row, steps
from llmtrain.generation.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Advance = Callable[[int], None]
"""Called with the number of sequences that are done."""


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    ranks: Ranks,
    sharded: bool,
    confidence: bool = False,
    advance: Advance = lambda n: None,
) -> list[Scored]:
    """How probable each continuation is, in the order of `pairs`.

    Pairs of like length run together, the longest first: what does not fit into memory fails at once. Padding stands on
    the right, where causality hides it.

    Args:
        model: with MPT's forward, in evaluation mode; under FSDP the root.
        pairs: this rank's.
        batch_size: sequences in a forward.
        ranks: who takes part.
        sharded: every rank makes as many forwards as the one with the most: they gather the weights together.
        confidence: also give the largest probabilities, which takes all logits of a batch at once.
        advance: is told about progress.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = ranks.rounds(len(batches)) if sharded else len(batches)  # asked before the first forward, as all ranks do
    found: dict[int, Scored] = {}
    for batch in batches:
        for i, scored in zip(batch, _forward(model, [pairs[i] for i in batch], confidence, device), strict=True):
            found[i] = scored
        advance(len(batch))
    for _ in range(rounds - len(batches)):
        _idle(model, confidence, device)
    return [found[i] for i in range(len(pairs))]


def _forward(model: nn.Module, pairs: Sequence[Pair], confidence: bool, device: torch.device) -> Iterable[Scored]:
    longest = max(map(len, pairs))
    input_ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for row, pair in enumerate(pairs):
        start, end = len(pair.context), len(pair)
        input_ids[row, :start] = torch.from_numpy(pair.context)
        input_ids[row, start:end] = labels[row, start:end] = torch.from_numpy(pair.continuation)
    losses, greedy, surest = _by_token(model, input_ids.to(device), labels.to(device), confidence)
    for row, pair in enumerate(pairs):
        place = slice(len(pair.context) - 1, len(pair) - 1)  # position t predicts token t + 1
        mine = losses[row, place]
        yield Scored(
            loss=float(mine.mean()),
            probability=float((-mine).exp().mean()),
            greedy=bool(greedy[row, place].all()),
            confidence=None if surest is None else float(surest[row, place].min()),
        )


def _by_token(
    model: nn.Module, input_ids: Tensor, labels: Tensor, confidence: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(batch, T) on the CPU: losses in float64, whether the target has the largest logit, the largest probability."""
    if not confidence:
        output = model(input_ids=input_ids, labels=labels, token_losses=True)
        return output.token_losses.double().cpu(), output.token_correct.cpu(), None
    logits = model(input_ids=input_ids).logits[:, :-1]
    targets = input_ids[:, 1:]
    logs = logits.float().log_softmax(-1)
    losses = -logs.gather(-1, targets[..., None]).squeeze(-1)
    greedy = logits.argmax(-1) == targets
    return losses.double().cpu(), greedy.cpu(), logs.amax(-1).exp().double().cpu()


def _idle(model: nn.Module, confidence: bool, device: torch.device) -> None:
    """A forward whose result nobody needs, while other ranks still have something to do."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    _by_token(model, ids, ids, confidence)


def generate_answers(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerFast",
    contexts: Sequence[Ids],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int],
    stops: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    sharded: bool,
    advance: Advance = lambda n: None,
) -> list[str]:
    """What the model writes behind each context, in their order.

    Args:
        model: as above.
        tokenizer: decodes the answers.
        contexts: this rank's; those of all ranks, the same on each, where the model is sharded.
        max_new_tokens: of an answer.
        sampling: how tokens are drawn.
        eos_ids: an answer ends with one of these.
        stops: an answer ends with one of these texts, which is not cut off here.
        seeds: of each context, for sampling: neighbours in a batch do not matter.
        batch_size: contexts that run together.
        sharded: all ranks go on with the tokens of rank 0.
        advance: is told about progress.
    """
    answers: dict[int, str] = {}
    order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens: list[list[int]] = [[] for _ in batch]

        def ended(row: int, token: int, tokens: list[list[int]] = tokens) -> bool:
            return bool(stops) and any(stop in decode(tokenizer, [*tokens[row]]) for stop in stops)

        rows = [Row(contexts[i].tolist(), max_new_tokens, sampling, seeds[i]) for i in batch]
        agree = _as_rank_zero if sharded and dist.is_initialized() else None
        for step in steps(decoder_for(model), rows, eos_ids=eos_ids, ended=ended, agree=agree):
            for row, token in step:
                tokens[row].append(token)
        for i, ids in zip(batch, tokens, strict=True):
            answers[i] = decode(tokenizer, ids)
        advance(len(batch))
    return [answers[i] for i in range(len(contexts))]


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _as_rank_zero(tokens: Tensor) -> Tensor:
    """A tie that two devices break differently would end in ranks that wait for each other."""
    tokens = tokens.contiguous()
    dist.broadcast(tokens, src=0)
    return tokens
