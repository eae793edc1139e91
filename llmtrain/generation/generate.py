"""Generation: batches of prompts of different lengths, padded on the left, one token after another."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from llmtrain.errors import UserError
from llmtrain.generation.decoder import Decoder, decoder_for
from llmtrain.generation.sampling import Sampling

MOST_RESERVED = 4096
"""New tokens that memory is made ready for before the first: an answer that may be longer need not be."""


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
        for step in steps(
            decoder_for(model) if isinstance(model, nn.Module) else model,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=eos_ids,
            seed=seed,
            first_index=first_index,
            agree=agree,
        ):
            for row, token in step:
                answers[row].append(token)
    return answers


@torch.no_grad()  # not inference_mode: what FSDP gathers in there could not be used for training any more
def steps(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    first_index: int = 0,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """The same one step at a time: (prompt, its next token) of each prompt that goes on.

    The decoder may have seen the beginning of the prompts before.
    """
    if min(map(len, prompts)) < 1 or max_new_tokens < 1:
        raise ValueError("generation needs prompts of at least one token, and max_new_tokens of at least 1")
    _refuse_beyond_positions(decoder.positions, prompts, max_new_tokens)
    sampling = sampling or Sampling(temperature=0)
    ids, seen = _pad_left(prompts, decoder.device)
    decoder.reserve(ids.shape[1] + min(max_new_tokens, MOST_RESERVED) - 1)
    generators = [torch.Generator().manual_seed(_row_seed(seed, first_index + row)) for row in range(len(prompts))]
    ends = torch.tensor(sorted(eos_ids), device=decoder.device, dtype=torch.long)
    active = list(range(len(prompts)))
    for count in range(1, max_new_tokens + 1):
        tokens = sampling.draw(decoder(ids, seen), [generators[row] for row in active])
        tokens = agree(tokens) if agree is not None else tokens
        yield list(zip(active, tokens.tolist(), strict=True))
        if count == max_new_tokens:
            break
        going = ~torch.isin(tokens, ends)
        if not going.all():  # finished rows leave the batch instead of computing padding
            rows = going.nonzero().flatten()
            if not len(rows):
                break
            active = [active[row] for row in rows.tolist()]
            decoder.keep_rows(rows)
            tokens, ids, seen = tokens[rows], ids[rows], seen[rows]
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


def _refuse_beyond_positions(positions: int | None, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    # The last token is never fed back, so it needs no position. Padding counts, as in the model's own check.
    needed = max(map(len, prompts)) + max_new_tokens - 1
    if positions is not None and needed > positions:
        raise UserError(
            f"{max(map(len, prompts))} prompt tokens + {max_new_tokens} new ones do not fit into this model's "
            f"{positions} learned positions (max_seq_len); shorten the prompt or max_new_tokens."
        )


def _row_seed(seed: int, index: int) -> int:
    """A seed a row. The multiplier (2^64 / golden ratio) keeps neighbouring seeds and neighbouring rows apart."""
    return (seed * 0x9E3779B97F4A7C15 + index) % 2**63
