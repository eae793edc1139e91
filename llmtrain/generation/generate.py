"""Generation: batches of prompts of different lengths, padded on the left, one token after another."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.errors import UserError
from llmtrain.generation.decoder import Decoder, decoder_for
from llmtrain.generation.sampling import GREEDY, Sampling, draw

MOST_RESERVED = 4096
"""New tokens that memory is made ready for before the first: an answer that may be longer need not be."""


@dataclass(frozen=True)
class Row:
    """A prompt in a batch."""

    ids: Sequence[int]
    """At least one token."""
    max_new_tokens: int
    sampling: Sampling = GREEDY
    index: int = 0
    """Its place among all prompts: with the seed it decides what chance does to it, whatever is beside it."""


def generate(
    model: nn.Module | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    first_index: int = 0,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """Continue each prompt until an end token or ``max_new_tokens``.

    Each row has a random generator of its own, from the seed and the prompt's index: what a prompt gets does not
    depend on the prompts beside it (up to the rounding of float arithmetic in batches of another shape).

    Args:
        model: An MPT in evaluation mode, or a decoder that has not seen anything yet.
        prompts: Token ids, at least one a prompt.
        max_new_tokens: Largest number of new tokens; beyond the model's max_seq_len too, if it uses ALiBi.
        sampling: Temperature, top_k, top_p; greedy by default.
        eos_ids: A row ends after one of these (which is part of the result).
        seed: Of the random generators.
        first_index: Index of the first prompt, when the prompts are a part of a longer list.
        agree: Called with the tokens that were drawn, (rows,) int64, and returns those to go on with: for ranks that
            must not part.

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: the model has learned positions and prompt and answer do not fit into them.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if prompts:
        sampling = sampling or GREEDY
        rows = [Row(ids, max_new_tokens, sampling, index) for index, ids in enumerate(prompts, start=first_index)]
        decoder = decoder_for(model) if isinstance(model, nn.Module) else model
        for step in steps(decoder, rows, eos_ids=eos_ids, seed=seed, agree=agree):
            for row, token in step:
                answers[row].append(token)
    return answers


@torch.no_grad()  # not inference_mode: what FSDP gathers in there could not be used for training any more
def steps(
    decoder: Decoder,
    rows: Sequence[Row],
    *,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    ended: Callable[[int, int], bool] | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """The same one step at a time: (row, its next token) of each row that goes on.

    The decoder may have seen the beginning of the prompts before. `ended` is asked after each token whether it was the
    row's last.
    """
    if any(not row.ids or row.max_new_tokens < 1 for row in rows):
        raise ValueError("generation needs prompts of at least one token, and max_new_tokens of at least 1")
    _refuse_beyond_positions(decoder.positions, rows)
    ids, seen = _pad_left([row.ids for row in rows], decoder.device)
    longest = max(row.max_new_tokens for row in rows)
    decoder.reserve(ids.shape[1] + min(longest, MOST_RESERVED) - 1)
    generators = [torch.Generator().manual_seed(_row_seed(seed, row.index)) for row in rows]
    active = list(range(len(rows)))
    ends = set(eos_ids)
    for count in range(1, longest + 1):
        tokens = draw(decoder(ids, seen), [rows[n].sampling for n in active], [generators[n] for n in active])
        tokens = agree(tokens) if agree is not None else tokens
        drawn = list(zip(active, tokens.tolist(), strict=True))
        yield drawn
        going = [
            place
            for place, (n, token) in enumerate(drawn)
            if count < rows[n].max_new_tokens and token not in ends and not (ended is not None and ended(n, token))
        ]
        if not going:
            break
        if len(going) < len(active):  # finished rows leave the batch instead of computing padding
            active = [active[place] for place in going]
            kept = torch.tensor(going, device=decoder.device)
            decoder.keep_rows(kept)
            tokens, ids, seen = tokens[kept], ids[kept], seen[kept]
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (batch, longest) with zeros in front, and a mask of the same shape, True for real tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    seen = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        seen[row, longest - len(prompt) :] = True
    return ids.to(device), seen.to(device)


def _refuse_beyond_positions(positions: int | None, rows: Sequence[Row]) -> None:
    # The last token is never fed back, so it needs no position. Padding counts, as in the model's own check.
    prompt, new = max(len(row.ids) for row in rows), max(row.max_new_tokens for row in rows)
    if positions is not None and prompt + new - 1 > positions:
        raise UserError(too_long(prompt, new, positions))


def too_long(prompt: int, new: int, positions: int) -> str:
    """What to say of a prompt that does not fit."""
    return (
        f"{prompt} prompt tokens + {new} new ones do not fit into this model's "
        f"{positions} learned positions (max_seq_len); shorten the prompt or max_new_tokens."
    )


def _row_seed(seed: int, index: int) -> int:
    """A seed a row. The multiplier (2^64 / golden ratio) keeps neighbouring seeds and neighbouring rows apart."""
    return (seed * 0x9E3779B97F4A7C15 + index) % 2**63
