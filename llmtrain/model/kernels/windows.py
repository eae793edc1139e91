"""ALiBi windows of flex and flash: which keys are so far away that they cannot be told from no keys at all.

Known before the kernel runs, and computed on the device in a few small operations. Blockwise attention, which computes
the keys near a query first, has the tighter bound of `alibi_window.py`; what is negligible is the same.

Row i of the softmax holds scores s_ij = q_i.k_j * scale - slope * (i - j). Its log-sum-exp is at least the score of the
query with its own key, s_ii = q_i.k_i * scale, where the distance is 0. No score is above |q_i| |k_j| scale -
slope * (i - j). So once that bound is below s_ii - ln 2^25 - ln T, all keys from there on, at most T of them, weigh
together less than 2^-25 of the sum: half of float32's last bit. With soft-capping both sides go through the cap.

What all keys have in common (trained keys share a large part) moves a row's scores alike and drops out of its softmax.
So the keys' mean is taken off first, but with soft-capping, which is not linear. Norms are measured on q and k as the
kernel gets them: the windows are exact for whatever the weights are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.kernels.alibi_window import negligible

LONG = 8192
"""Keys from which on measuring and skipping cost less than they save: below, a launch-bound dozen of small kernels
stands against an attention of a millisecond, of which heads with flat slopes keep most anyway."""


class Bounds(NamedTuple):
    """What is measured: (batch, heads, blocks), in float32 at least. A head's block of positions, or all of them."""

    query_norm: Tensor
    """Largest |q_i| * scale of the block's queries."""
    key_norm: Tensor
    """Largest |k_j| of the block's keys."""
    own_score: Tensor
    """Smallest q_i.k_i * scale of the block's queries."""


def measure(q: Tensor, k: Tensor, scale: float, block: int | None = None, *, softcap: float | None = None) -> Bounds:
    """Norms and own scores; q (batch, heads, n_queries, head_dim), k (batch, kv_heads, n_keys, head_dim).

    The queries are the last n_queries positions. Without a `block` all positions make one. No gradient flows.
    """
    q, k = q.detach(), k.detach()
    if q.dtype != torch.float64:
        q, k = q.float(), k.float()
    if softcap is None:
        k = k - k.mean(dim=2, keepdim=True)
    groups = q.shape[1] // k.shape[1]
    grouped = q.view(q.shape[0], k.shape[1], groups, *q.shape[2:])
    own_keys = k[:, :, k.shape[2] - q.shape[2] :].unsqueeze(2)
    own = (grouped * own_keys).sum(-1).flatten(1, 2) * scale
    q_norm = q.square().sum(-1).sqrt() * scale
    k_norm = k.square().sum(-1).sqrt().repeat_interleave(groups, dim=1)
    return Bounds(
        _blocks(q_norm, block, 0.0).amax(-1),
        _blocks(k_norm, block, 0.0).amax(-1),
        _blocks(own, block, math.inf).amin(-1),
    )


def kept_blocks(
    bounds: Bounds, slopes: Tensor, block: int, first: int, margin: Tensor | float, softcap: float | None
) -> Tensor:
    """Which key blocks a query block has to look at, (batch, heads, query blocks, key blocks) bool.

    Args:
        bounds: measured with the same `block` and `softcap`.
        slopes: (heads,).
        block: positions of a block.
        first: position of the first query.
        margin: `negligible(...)`; a tensor where the number of keys is not to be compiled in.
        softcap: see `Attend`.

    Says nothing of causality: blocks of the future have distance 0.
    """
    query_norm, key_norm, own = bounds
    device = own.device
    begins = first + block * torch.arange(query_norm.shape[-1], device=device)
    ends = block * torch.arange(1, key_norm.shape[-1] + 1, device=device) - 1
    distance = (begins[:, None] - ends).clamp(min=0).to(own.dtype)
    highest = query_norm[..., :, None] * key_norm[..., None, :]
    if softcap is not None:
        highest, own = torch.tanh(highest / softcap) * softcap, torch.tanh(own / softcap) * softcap
    highest = highest - slopes.to(own.dtype)[:, None, None] * distance
    return ~(highest < own[..., None] - margin)  # so that NaN keeps everything


def needed_windows(bounds: Bounds, slopes: Tensor, n_keys: int, softcap: float | None) -> Tensor:
    """The largest distance that each head has to look at, (heads,), for bounds over all positions."""
    highest = (bounds.query_norm * bounds.key_norm).flatten(1)
    own = bounds.own_score.flatten(1)
    if softcap is not None:
        highest, own = torch.tanh(highest / softcap) * softcap, torch.tanh(own / softcap) * softcap
    return ((highest - own + negligible(torch.float32, n_keys)) / slopes.to(own.dtype)).amax(0)


def _blocks(x: Tensor, block: int | None, filler: float) -> Tensor:
    """(..., T) -> (..., blocks, block), the last one filled up."""
    if block is None:
        return x[..., None, :]
    x = F.pad(x, (0, -x.shape[-1] % block), value=filler)
    return x.view(*x.shape[:-1], -1, block)
