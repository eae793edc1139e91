"""Cross-entropy of a language-model head that never holds all logits.

The logits of a 50k vocabulary outweigh all other activations: 2048 tokens make 0.4 GB in float32, their softmax and
gradient as much again. Here they exist for one chunk of rows at a time. When gradients are wanted they are formed in
the forward, where the softmax is at hand: gradients of the hidden states and of the head weight are both linear in
the incoming scalar, so backward only scales them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Targets with this number are not counted."""

CHUNK_BYTES = 64 * 2**20
"""Float32 logits of a chunk, about."""
CACHED_BYTES = 2 * 2**20
"""Float32 logits that stay in a CPU's cache, about."""
PRODUCT_ROWS = 4096
"""Rows of the weight gradient that are computed at a time in low precision."""


class TokenLoss(NamedTuple):
    """Sums over the targets that count, so that micro-batches and ranks can be added up."""

    loss_sum: Tensor
    """Sum of -log p(target), scalar, float32 (float64 for a float64 model)."""
    n_targets: Tensor
    """Number of targets, int64 scalar."""
    n_correct: Tensor | None
    """How many of them have the largest logit, int64 scalar; None when not asked for."""
    token_losses: Tensor | None = None
    """-log p(target) of each target, in the shape of the targets, 0 where ignored; not differentiable; None when not
    asked for."""
    token_correct: Tensor | None = None
    """Whether each target has the largest logit, bool in the shape of the targets, False where ignored; None unless
    both the number and each target's loss are asked for."""


def shift(labels: Tensor) -> Tensor:
    """Targets of a causal model: position t is to predict labels[:, t + 1], the last position nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap): about x near 0, and never beyond +-cap (Gemma 2, arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_bytes: int | None = None,
    count_correct: bool = False,
    per_token: bool = False,
    softcap: float | None = None,
) -> TokenLoss:
    """Cross-entropy of logits = hidden @ weight.T against targets, in chunks of rows.

    Args:
        hidden: (..., d_model).
        weight: (vocab_size, d_model), the embedding matrix or an untied head.
        targets: integers in the shape of `hidden` less its last dimension; IGNORED ones do not count.
        chunk_bytes: size of a chunk's float32 logits; one chunk if all fits. None: see `rows_in_a_chunk`.
        count_correct: also count where the largest logit is the target's.
        per_token: also give the loss of each target.
        softcap: soft-cap the logits at this number (`soft_cap`), in float32 at least.

    Inside autocast the matmuls run in autocast's dtype; softmax and sums in float32 at least. No target counts: the
    loss is 0 and so are the gradients.
    """
    shape = targets.shape
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    n_targets, counted = (targets != IGNORED).sum(), None
    if hidden.device.type == "cpu" and int(n_targets) < 0.9 * len(targets):
        # Rows that do not count need no logits. (On an accelerator, asking for the number would stall the queue.)
        counted = (targets != IGNORED).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if chunk_bytes is None:
        # Where a CPU has them in half precision, twice as many take the same memory; a GPU has them in float32 as well.
        chunk_bytes = default_chunk_bytes(*weight.shape) * (4 // dtype.itemsize if kind == "cpu" else 1)
    rows = rows_in_a_chunk(len(targets), weight.shape[0], weight.shape[1], chunk_bytes)
    how = _Settings(rows, dtype, softcap, count_correct, per_token)
    with torch.autocast(kind, enabled=False):
        loss_sum, n_correct, *each = _ChunkedCrossEntropy.apply(hidden, weight, targets, how, torch.is_grad_enabled())
    token_losses, token_correct = (_at_targets(values, counted, shape) for values in each)
    return TokenLoss(loss_sum, n_targets, n_correct, token_losses, token_correct)


def _at_targets(values: Tensor | None, counted: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Values of the targets that were counted, in the shape of all targets, 0 elsewhere."""
    if values is not None and counted is not None:
        values = values.new_zeros(shape.numel()).index_copy_(0, counted, values)
    return None if values is None else values.view(shape)


def default_chunk_bytes(vocab_size: int, d_model: int) -> int:
    """Float32 logits of a chunk.

    Each chunk adds once to the (vocab_size, d_model) weight gradient, which costs as much as d_model / 2 rows of
    logits do: fewer rows than that would make the adding dominate. So it is CHUNK_BYTES, or half the weight.
    """
    return max(CHUNK_BYTES, 4 * vocab_size * d_model // 2)


def rows_in_a_chunk(n_rows: int, vocab_size: int, d_model: int, chunk_bytes: int | None = None) -> int:
    """Rows of a chunk, so that all chunks are about equal and none has more than `chunk_bytes` of float32 logits."""
    most = max(1, (chunk_bytes or default_chunk_bytes(vocab_size, d_model)) // (4 * vocab_size))
    n_chunks = max(1, -(-n_rows // most))
    return max(1, -(-n_rows // n_chunks))


class _Settings(NamedTuple):
    rows: int
    dtype: torch.dtype
    softcap: float | None = None
    count_correct: bool = False
    per_token: bool = False


class _Grads(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None


class _Sums(NamedTuple):
    loss: Tensor
    n_correct: Tensor | None
    token_losses: Tensor | None
    token_correct: Tensor | None


def _forward_and_grads(
    hidden: Tensor, weight: Tensor, targets: Tensor, how: _Settings, want: tuple[bool, bool]
) -> tuple[_Sums, _Grads]:
    """Loss sum, what else is asked for, and the gradients of the loss sum that `want` asks for."""
    dtype = how.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = _Sums(
        torch.zeros((), dtype=wide, device=hidden.device),
        torch.zeros((), dtype=torch.int64, device=hidden.device) if how.count_correct else None,
        torch.empty(len(targets), dtype=wide, device=hidden.device) if how.per_token else None,
        torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        if how.per_token and how.count_correct
        else None,
    )
    grad_hidden = torch.zeros_like(hidden) if want[0] else None
    grad_weight: Tensor | None = None
    w = weight.to(dtype)
    for start in range(0, len(targets), how.rows):
        chunk = slice(start, start + how.rows)
        y = targets[chunk]
        ignored = (y == IGNORED)[:, None]
        # An ignored row is made 0 before the matmul: whatever stood there, its logits are finite and its part of the
        # weight gradient is 0, without a pass over the logits.
        h = hidden[chunk].to(dtype).masked_fill(ignored, 0)
        logits = h @ w.t()
        # On a CPU a few rows go through all that follows while they are in the cache. A GPU takes all at once.
        at_once = max(1, CACHED_BYTES // (4 * len(w))) if y.device.type == "cpu" else len(y)
        for first in range(0, len(y), at_once):
            few = slice(first, first + at_once)
            _to_gradient(logits[few], y[few], how.softcap, start + first, sums, any(want))
        if grad_hidden is not None:
            grad_hidden[chunk] = (logits @ w).masked_fill_(ignored, 0)
        if want[1]:
            grad_weight = _plus_product(grad_weight, logits.t(), h, wide)
        del logits
    if want[1]:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    return sums, _Grads(grad_hidden, grad_weight)


def _to_gradient(logits: Tensor, y: Tensor, softcap: float | None, place: int, sums: _Sums, wanted: bool) -> None:
    """Adds the rows' losses to `sums` and, if wanted, overwrites their logits with the gradient with respect to them.

    y are the targets, `place` the first row's number among all.
    """
    wide = sums.loss.dtype
    x, slope = logits, None
    if softcap is not None:
        x = logits.to(wide).div(softcap).tanh_()
        slope = 1 - x * x
        x.mul_(softcap)
    if sums.n_correct is not None:
        correct = x.argmax(-1) == y
        sums.n_correct.add_(correct.sum())
        if sums.token_correct is not None:
            sums.token_correct[place : place + len(y)] = correct
    p = torch.log_softmax(x, dim=-1, dtype=wide)
    at = (torch.arange(len(y), device=y.device), y.clamp(min=0))
    losses = p[at].neg_().masked_fill_(y == IGNORED, 0)
    sums.loss.add_(losses.sum())
    if sums.token_losses is not None:
        sums.token_losses[place : place + len(y)] = losses
    if wanted:
        p.exp_()
        p[at] -= 1  # d loss / d logits = softmax - one-hot
        logits.copy_(p if slope is None else p.mul_(slope))


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Return total + a @ b in `wide`, in place; a product of lower precision exists for some rows at a time only."""
    if a.dtype == wide:
        return a @ b if total is None else total.addmm_(a, b)
    empty = total is None
    total = torch.empty(len(a), b.shape[1], dtype=wide, device=a.device) if total is None else total
    for first in range(0, len(a), PRODUCT_ROWS):
        rows = slice(first, first + PRODUCT_ROWS)
        if empty:
            total[rows] = a[rows] @ b
        else:
            total[rows] += a[rows] @ b
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, how: _Settings, grad_enabled: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        want = (grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1])
        (loss, *others), ctx.grads = _forward_and_grads(hidden, weight, targets, how, want)
        if any(want):
            ctx.save_for_backward(hidden, weight, targets)
            ctx.settings = (_Settings(how.rows, how.dtype, how.softcap), want)
        ctx.mark_non_differentiable(*(t for t in others if t is not None))
        return loss, *others  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # The gradients are handed over, not kept: autograd then takes them as they are instead of copying the weight's
        # (150 MB for a small model). Only a second backward through a retained graph has to compute them again.
        grads = ctx.grads or _forward_and_grads(*ctx.saved_tensors, *ctx.settings)[1]
        ctx.grads = None
        if grad.device.type != "cpu" or float(grad) != 1.0:
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None)
