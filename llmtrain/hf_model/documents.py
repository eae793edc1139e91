"""Attention masks and positions of padded and packed rows, as transformers' models take them."""

import torch
from torch import Tensor

from llmtrain.errors import UserError


def packed(sequence_id: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mask and positions of rows that hold several documents.

    Args:
        sequence_id: (batch, T) document numbers, -1 at padding. A document's tokens stand side by side.
        dtype: of the mask; what attention computes in.

    Returns:
        A mask (batch, 1, T, T), 0 where the query (third dimension) sees the key and the most negative number
        elsewhere: causal, within a document. And positions (batch, T) that begin at 0 in each document. Padding sees
        padding, so no row of the mask is empty (its softmax would be NaN).
    """
    same = sequence_id[:, :, None] == sequence_id[:, None, :]
    seen = same & torch.ones_like(same[0], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=sequence_id.device)
    mask.masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None], restarting_positions(sequence_id)


def restarting_positions(sequence_id: Tensor) -> Tensor:
    """0, 1, 2, ... within each document of (batch, T) document numbers."""
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device).expand_as(sequence_id)
    begins = torch.ones_like(sequence_id, dtype=torch.bool)
    begins[:, 1:] = sequence_id[:, 1:] != sequence_id[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


def padded_on_the_right(attention_mask: Tensor) -> bool:
    """Whether causality alone hides the padding of a (batch, T) mask: no real token stands after a padded one."""
    real = attention_mask.bool()
    return bool((real[:, 1:] <= real[:, :-1]).all())


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions (batch, T) that count real tokens: padding on the left moves nothing."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def refuse_beyond_window(config: object, length: int) -> None:
    """A packed row's mask replaces the architecture's own, so a sliding window must not be shorter than the row.

    Raises:
        UserError: it is.
    """
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False or window >= length:
        return
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in str(kind) for kind in kinds):
        return
    raise UserError(
        f"packing: rows of {length} tokens are longer than the model's sliding_window of {window}, and the mask that "
        "keeps examples apart would widen it. Use max_seq_len of at most the window, or packing: false."
    )
