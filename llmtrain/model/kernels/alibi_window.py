"""ALiBi windows of blockwise attention: which keys weigh so little that float32 cannot tell them from none.

(On a GPU, where nothing of a row is known before its kernel runs, `windows.py` has a bound of norms alone.)

A key's score is at most scale * (q . c + |q| r), c and r being centre and radius of a ball around the keys of its
block, less slope * distance. Where that is below the row's log-sum-exp by ln 2^25 + ln n_keys for all rows of a query
block, the key weighs less than 2^-25 / n_keys in each, and all such keys together weigh less than 2^-25 of the softmax
sum. What of the log-sum-exp is known already (the block on the diagonal) is a lower bound of it.

Balls around the block's centre are tighter than norms: trained keys have a large part in common, which moves all scores
of a row alike and drops out of the softmax.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Keys that are kept or skipped together."""
_CHUNK = 1 << 23
"""Numbers held at once while bounds are computed."""


def negligible(dtype: torch.dtype, n_keys: int) -> float:
    """How far below a row's log-sum-exp a score must be: the rounding of float32 (float64), shared by n_keys keys."""
    return (54 if dtype == torch.float64 else 25) * math.log(2) + math.log(n_keys)


class KeyBalls(NamedTuple):
    """Balls around the keys of each block of `BLOCK` positions, counted from `first`."""

    first: int
    centres: Tensor
    """(batch, kv_heads, blocks, head_dim), float32 or float64."""
    radii: Tensor
    """(batch, kv_heads, blocks)."""


def key_balls(k: Tensor, first: int, end: int) -> KeyBalls:
    """Balls around k[:, :, first:end], k being (batch, kv_heads, n_keys, head_dim)."""
    wide = torch.promote_types(k.dtype, torch.float32)
    centres, radii = [], []
    for begin in range(first, end, BLOCK):
        keys = k[:, :, begin : min(begin + BLOCK, end)].to(wide)
        centre = keys.mean(2)
        centres.append(centre)
        radii.append((keys - centre[:, :, None]).square_().sum(-1).amax(2).sqrt_())
    return KeyBalls(first, torch.stack(centres, 2), torch.stack(radii, 2))


def first_kept(
    q: Tensor,
    lse: Tensor,
    balls: KeyBalls,
    *,
    low: int,
    high: int,
    middle: int,
    slopes: Tensor,
    scale: float,
    softcap: float | None,
    margin: float,
) -> Tensor:
    """For each head the first key position, between `low` and `high`, from which keys are not negligible: (heads,)
    int64.

    Args:
        q: queries of one block, (batch, heads, n, head_dim).
        lse: (batch, heads, n), a lower bound of their log-sum-exp, scores being taken with the bias
            slope * (j - middle).
        balls: around the keys; they cover low..high.
        low: first position that may be seen.
        high: end of the positions in question.
        middle: the position that the bias is relative to.
        slopes: (heads,), of ALiBi.
        scale: factor on q.k.
        softcap: of the scores.
        margin: `negligible(...)`.
    """
    batch, heads, n, _ = q.shape
    b0, b1 = (low - balls.first) // BLOCK, -((balls.first - high) // BLOCK)
    centres, radii = balls.centres[:, :, b0:b1], balls.radii[:, :, b0:b1]
    kv_heads = centres.shape[1]
    norms = centres.norm(dim=-1)
    q = q.to(centres.dtype)
    above = torch.full((heads, b1 - b0), -math.inf, dtype=q.dtype, device=q.device)
    step = max(1, _CHUNK // (batch * heads * (b1 - b0)))
    for row in range(0, n, step):
        rows = q[:, :, row : row + step].reshape(batch, kv_heads, -1, q.shape[-1])
        size = rows.norm(dim=-1, keepdim=True)
        # 2^-9 is room for the rounding of these very sums, on a GPU with TF32 as well.
        bound = torch.baddbmm(
            (size * (radii + (norms + radii) * 2**-9)[:, :, None]).flatten(0, 1),
            rows.flatten(0, 1),
            centres.flatten(0, 1).transpose(1, 2),
        ).mul_(scale)
        if softcap is not None:
            bound = bound.div_(softcap).tanh_().mul_(softcap)
        bound = bound.view(batch, heads, -1, b1 - b0) - lse[:, :, row : row + step, None]
        above = torch.maximum(above, bound.amax((0, 2)))
    ends = torch.arange(b0 + 1, b1 + 1, device=q.device) * BLOCK + balls.first
    nearest = ends.clamp(max=high) - 1 - middle
    kept = ~(above + slopes[:, None].to(above) * nearest < -margin)  # so that NaN keeps everything
    block = torch.where(kept.any(1), kept.int().argmax(1), b1 - b0)
    return (balls.first + (b0 + block) * BLOCK).clamp(low, high)


def share_kept(slopes: tuple[float, ...], n: int, bound: float, *, block: int = 128) -> float:
    """The share of causal (head, query block, key block) triples that are kept when |q.k| * scale <= bound everywhere.

    The a-priori window of a head is (2 * bound + ln 2^25 + ln n) / slope keys; measured bounds skip more.
    """
    blocks = -(-n // block)
    kept = 0
    for slope in slopes:
        window = math.ceil((2 * bound + negligible(torch.float32, n)) / slope)
        far = min(blocks - 1, -(-window // block))  # key blocks before the diagonal that a query block still reads
        kept += (far + 1) * blocks - far * (far + 1) // 2
    return kept / (len(slopes) * blocks * (blocks + 1) / 2)


def share_measured(first: Tensor, plan: Tensor) -> float:
    """The share of the causal (head, query, key) triples in reach that a call of blockwise attention computed.

    Args:
        first: its third result, the first key of each block and head.
        plan: its plan (`blockwise_plan.plan`).
    """
    computed = visible = 0.0
    for block, starts in zip(plan.tolist(), first.double().mean(1).tolist(), strict=True):
        _, begin, end, seen_from, *_ = block
        own = (end - begin) * (end - begin + 1) / 2
        computed += own + (end - begin) * (begin - starts)
        visible += own + (end - begin) * (begin - seen_from)
    return computed / visible
