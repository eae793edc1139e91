"""Generation with a KV cache: batches of prompts of different lengths, padded on the left."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.generation.sampling import Sampling
from llmtrain.model.cache import KVCache
from llmtrain.model.mpt import MPT


@torch.inference_mode()
def generate(
    model: MPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_ids: Collection[int] = (),
    seed: int = 0,
    first_index: int = 0,
) -> list[list[int]]:
    """Continue each prompt until an end token or ``max_new_tokens``.

    Each row has a random generator of its own, from the seed and the prompt's index: what a prompt gets does not
    depend on the prompts beside it (up to the rounding of float arithmetic in batches of another shape).

    Args:
        model: In evaluation mode.
        prompts: Token ids, at least one a prompt.
        max_new_tokens: Largest number of new tokens; beyond the model's max_seq_len too, if it uses ALiBi.
        sampling: Temperature, top_k, top_p; greedy by default.
        eos_ids: A row ends after one of these (which is part of the result).
        seed: Of the random generators.
        first_index: Index of the first prompt, when the prompts are a part of a longer list.

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: the model has learned positions and prompt and answer do not fit into them.
    """
    if not prompts:
        return []
    if min(map(len, prompts)) < 1 or max_new_tokens < 1:
        raise ValueError("generation needs prompts of at least one token, and max_new_tokens of at least 1")
    _refuse_beyond_learned_positions(model, prompts, max_new_tokens)
    sampling = sampling or Sampling(temperature=0)
    device = model.transformer.wte.weight.device
    ids, seen = _pad_left(prompts, device)
    generators = [torch.Generator().manual_seed(_row_seed(seed, first_index + row)) for row in range(len(prompts))]
    ends = torch.tensor(sorted(eos_ids), device=device, dtype=torch.long)

    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    cache = KVCache(model.config.n_layers)
    logits = _prefill(model, ids, seen, cache)
    for count in range(1, max_new_tokens + 1):
        tokens = sampling.draw(logits, [generators[row] for row in active])
        for row, token in zip(active, tokens.tolist(), strict=True):
            answers[row].append(token)
        if count == max_new_tokens:
            break
        going = ~torch.isin(tokens, ends)
        if not going.all():  # finished rows leave the batch instead of computing padding
            rows = going.nonzero().flatten()
            if not len(rows):
                break
            active = [active[row] for row in rows.tolist()]
            cache.keep_rows(rows)
            tokens, seen = tokens[rows], seen[rows]
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
        logits = _logits(model, tokens[:, None], seen, cache)
    return answers


def _prefill(model: MPT, ids: Tensor, seen: Tensor, cache: KVCache) -> Tensor:
    """Logits after the prompts; the head runs on their last position only, not on (batch, T, vocab)."""
    if ids.shape[1] > 1:
        model.transformer(ids[:, :-1], seen[:, :-1], cache)
    return _logits(model, ids[:, -1:], seen, cache)


def _logits(model: MPT, ids: Tensor, seen: Tensor, cache: KVCache) -> Tensor:
    logits: Tensor = model(ids, attention_mask=seen, cache=cache).logits
    return logits[:, -1]


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (batch, longest) with zeros in front, and a mask of the same shape, True for real tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    seen = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        seen[row, longest - len(prompt) :] = True
    return ids.to(device), seen.to(device)


def _refuse_beyond_learned_positions(model: MPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    # The last token is never fed back, so it needs no position. Padding counts, as in the model's own check.
    needed = max(map(len, prompts)) + max_new_tokens - 1
    if model.config.uses_learned_positions and needed > model.config.max_seq_len:
        raise UserError(
            f"{max(map(len, prompts))} prompt tokens + {max_new_tokens} new ones do not fit into this model's "
            f"{model.config.max_seq_len} learned positions (max_seq_len); shorten the prompt or max_new_tokens."
        )


def _row_seed(seed: int, index: int) -> int:
    """A seed a row. The multiplier (2^64 / golden ratio) keeps neighbouring seeds and neighbouring rows apart."""
    return (seed * 0x9E3779B97F4A7C15 + index) % 2**63
