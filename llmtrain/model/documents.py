"""Packed rows: which document a token belongs to, where positions start over, and when a mask is needed at all."""

import torch
from torch import Tensor

PADDING = -1
"""The document number of padding. Its tokens see one another (so that everything stays finite) and nothing else."""


def documents_of(sequence_id: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The document of each token, (batch, T): `sequence_id`, with PADDING where the mask says so as well."""
    return sequence_id if attention_mask is None else sequence_id.masked_fill(~attention_mask.bool(), PADDING)


def causality_is_enough(documents: Tensor) -> bool:
    """Whether each row holds one document and, after it, padding: then no mask is needed.

    Decided by `sequence_id` alone, so that no change of tokens can change the kernel's path.
    """
    before, after = documents[:, :-1], documents[:, 1:]
    return bool(((after == before) | (after == PADDING)).all())


def positions_in(documents: Tensor) -> Tensor:
    """Position of each token in its own document, (batch, T): 0 where the number changes."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(index)
    starts[:, 1:] = index[:, 1:].masked_fill(documents[:, 1:] == documents[:, :-1], 0)
    return index - starts.cummax(dim=1).values
