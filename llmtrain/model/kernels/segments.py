"""Packed rows one document at a time: the work of sum(length^2) instead of rows * T^2, and no bias for each row."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.interface import Visibility

SHORTEST = 16
"""Mean length of documents below which one call for all of them costs less than a call for each (measured)."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where documents end, over all rows one behind another."""

    lengths: list[int]
    bias: Tensor | None
    """(1, heads, longest, longest): ALiBi and causality. Distances are the same wherever a document lies. None is
    causality alone."""


def segments(visibility: Visibility) -> Segments | None:
    """The documents as segments, where that is the same function and cheaper; else None."""
    documents = visibility.documents
    if documents is None or visibility.padding is not None or visibility.n_queries != visibility.n_keys:
        return None
    if visibility.window is not None:
        return None
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    rows, n = documents.shape
    distinct = sum(len(row.unique()) for row in documents)
    first = starts.flatten().nonzero().flatten()
    if len(first) != distinct or documents.numel() < SHORTEST * len(first):
        return None  # a number that comes back after another one is one document in two places
    lengths = torch.diff(first, append=first.new_tensor([rows * n])).tolist()
    if visibility.slopes is None:
        return Segments(lengths, None)
    longest = max(lengths)
    of_one = Visibility(longest, longest, visibility.device, visibility.dtype, slopes=visibility.slopes)
    return Segments(lengths, dense_bias(of_one))


def attend(q: Tensor, k: Tensor, v: Tensor, where: Segments, *, softmax_scale: float, dropout_p: float) -> Tensor:
    """Attention within each segment; shapes as in `Attend`, with as many queries as keys."""
    rows, heads, n, _ = q.shape
    # Split and joined once each: a slice of its own for each document would cost a full gradient each.
    split = (torch.split(x.transpose(1, 2).flatten(0, 1), where.lengths) for x in (q, k, v))
    parts = []
    for q_i, k_i, v_i in zip(*split, strict=True):  # (length, heads, head_dim)
        length = len(q_i)
        out = F.scaled_dot_product_attention(
            q_i.transpose(0, 1)[None],
            k_i.transpose(0, 1)[None],
            v_i.transpose(0, 1)[None],
            attn_mask=None if where.bias is None else where.bias[:, :, :length, :length],
            dropout_p=dropout_p,
            is_causal=where.bias is None,
            scale=softmax_scale,
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).view(rows, n, heads, -1).transpose(1, 2)
