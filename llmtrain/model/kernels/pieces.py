"""Attention of some queries over some keys, with its log-sum-exp, so that pieces can be merged into exact attention.

On a CPU torch's private flash kernel computes a piece: it takes causality and a bias of stride 0 at the same time,
which the public `scaled_dot_product_attention` does not. It is probed once; where it is missing or differs, on other
devices and with soft-capping, plain matrix products compute the same.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

FORBIDDEN = -1e30
"""Bias of a pair that must not be seen: finite, so that a row without a visible key in one piece stays finite there and
weighs exp(-1e30) = 0 when pieces are merged."""

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Args:
        q: (batch, heads, n, head_dim).
        k: (batch, kv_heads, m, head_dim); query head h reads key head h // (heads / kv_heads).
        v: as k.
        bias: added to the scores, broadcastable to (batch, heads, n, m), float32 (float64 for float64 q).
        causal: query i sees keys 0..i only.
        scale: factor on q.k.
        softcap: c makes c * tanh(score / c) of the scaled scores, before the bias.

    Returns:
        (batch, heads, n, head_dim) in q's dtype, and (batch, heads, n) in the bias' dtype.
    """
    if softcap is None and q.device.type == "cpu" and flash_on_cpu():
        parts = [
            _flash(_FORWARD, *x, 0.0, causal, attn_mask=mask, scale=scale) for x, mask in _grouped(bias, q, (k, v))
        ]
        if q.shape[1] == k.shape[1]:
            out, lse = parts[0]
            return out, lse
        of_out, of_lse = zip(*parts, strict=True)
        return _joined(of_out), _joined(of_lse)
    scores, _ = _scores(q, k, bias, causal, scale, softcap)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    out = _by_kv_head(weights, v) @ v.to(weights.dtype)
    return out.view(q.shape).to(q.dtype), lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this piece adds to the gradients of q, k and v.

    `out` and `lse` are those of all pieces merged, `grad` is the gradient of `out`; the others are as in `forward`.
    With them a piece's weights are the whole softmax's, and the sum over pieces is exact. The gradients have q's dtype.
    """
    if softcap is None and q.device.type == "cpu" and flash_on_cpu():
        calls = [
            _flash(_BACKWARD, grad_, q_, k_, v_, out_, lse_, 0.0, causal, attn_mask=mask, scale=scale)
            for (q_, grad_, out_, lse_, k_, v_), mask in _grouped(bias, q, (k, v), grad, out, lse)
        ]
        of_q, of_k, of_v = zip(*calls, strict=True)
        if q.shape[1] == k.shape[1]:
            return of_q[0], of_k[0], of_v[0]
        return _joined(of_q), _summed(of_k), _summed(of_v)
    scores, slope_of_cap = _scores(q, k, bias, causal, scale, softcap)
    weights = scores.sub_(lse[..., None]).exp_()
    wide = weights.dtype
    grad = grad.to(wide)
    by_kv = _by_kv_head(grad, k)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    d_scores = (by_kv @ v.to(wide).transpose(-2, -1)).view(weights.shape).sub_(delta).mul_(weights).mul_(scale)
    if slope_of_cap is not None:
        d_scores.mul_(slope_of_cap)
    dv = _by_kv_head(weights, v).transpose(-2, -1) @ by_kv
    dq = (_by_kv_head(d_scores, k) @ k.to(wide)).view(q.shape)
    dk = _by_kv_head(d_scores, k).transpose(-2, -1) @ _by_kv_head(q, k).to(wide)
    return dq, dk, dv


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two pieces over different keys as one: out (..., n, head_dim), lse (..., n). The result has lse's dtype."""
    total = torch.logaddexp(lse, other_lse)
    merged = out * (lse - total).exp_()[..., None]
    return merged.addcmul_(other.to(merged.dtype), (other_lse - total).exp_()[..., None]), total


@cache
def flash_on_cpu() -> bool:
    """Whether torch's private flash kernel for CPUs is there and computes what this file needs of it."""
    try:
        with torch.autocast("cpu", enabled=False), torch.device("cpu"), torch.no_grad():
            return _agrees()
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


def _agrees() -> bool:
    q, k, v, grad = torch.randn(4, 1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([[[[0.5, -1.0, 2.0]], [[0.0, 1.0, -0.5]]]])
    scores, _ = _scores(q, k, bias, True, 0.3, None)
    expected = scores.softmax(-1) @ v
    mask = bias.expand(1, 2, 3, 3)
    out, lse = _flash(_FORWARD, q, k, v, 0.0, True, attn_mask=mask, scale=0.3)
    grads = _flash(_BACKWARD, grad, q, k, v, out, lse, 0.0, True, attn_mask=mask, scale=0.3)
    weights = scores.softmax(-1)
    d_scores = weights * (grad @ v.transpose(-2, -1) - (grad * expected).sum(-1, keepdim=True)) * 0.3
    wanted = (d_scores @ k, d_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad)
    pairs = zip((out, lse, *grads), (expected, scores.logsumexp(-1), *wanted), strict=True)
    return all(torch.allclose(actual, right, atol=1e-4) for actual, right in pairs)


def _flash(name: str, *args: Any, **options: Any) -> Any:
    return getattr(torch.ops.aten, name)(*args, **options)


def _grouped(bias: Tensor | None, q: Tensor, kv: tuple[Tensor, ...], *like_q: Tensor) -> Any:
    """The kernel's arguments with as many key heads as query heads, by views alone: ((q, *like_q, *kv), bias) each.

    For grouped queries each row of the batch is a call, with key heads as its batch and each key head seen by its
    group with stride 0: nothing is repeated in memory.
    """
    batch, heads, n, _ = q.shape
    kv_heads, m = kv[0].shape[1:3]
    if bias is not None:
        bias = bias.expand(batch, heads, n, m)
    if kv_heads == heads:
        yield (q, *like_q, *kv), bias
        return
    shape = (kv_heads, heads // kv_heads)
    for row in range(batch):
        of_queries = (x[row].view(*shape, *x.shape[2:]) for x in (q, *like_q))
        of_keys = (x[row].unsqueeze(1).expand(*shape, *x.shape[2:]) for x in kv)
        yield (*of_queries, *of_keys), None if bias is None else bias[row].view(*shape, n, m)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Results (kv_heads, group, n, ...) of a `_grouped` call for each row, as (batch, heads, n, ...)."""
    return torch.stack([x.flatten(0, 1) for x in parts])


def _summed(parts: tuple[Tensor, ...]) -> Tensor:
    """Gradients of `_grouped` keys as (batch, kv_heads, m, head_dim): summed over each group, in float32 at least."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack([x.sum(1, dtype=wide) for x in parts])


def _by_kv_head(x: Tensor, kv: Tensor) -> Tensor:
    """(batch, heads, n, ...) as (batch, kv_heads, group * n, ...): products with keys broadcast nothing."""
    return x.reshape(x.shape[0], kv.shape[1], -1, x.shape[-1])


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores (batch, heads, n, m), in float32 at least, and the derivative of the soft-capping."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _by_kv_head(q, k).to(wide) @ k.to(wide).transpose(-2, -1)
    scores = scores.view(*q.shape[:3], k.shape[2]).mul_(scale)
    slope_of_cap = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope_of_cap = 1 - scores.square()
        scores.mul_(softcap)
    if bias is not None:
        scores += bias
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(future, FORBIDDEN)
    return scores, slope_of_cap
