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
    rows = rows_in_a_chunk(len(targets), weight.shape[0], weight.shape[1], chunk_bytes)
    how = _Settings(rows, dtype, softcap, count_correct, per_token)
    with torch.autocast(kind, enabled=False):
        loss_sum, n_correct, token_losses = _ChunkedCrossEntropy.apply(
            hidden, weight, targets, how, torch.is_grad_enabled()
        )
    if token_losses is not None:
        if counted is not None:
            token_losses = token_losses.new_zeros(shape.numel()).index_copy_(0, counted, token_losses)
        token_losses = token_losses.view(shape)
    return TokenLoss(loss_sum, n_targets, n_correct, token_losses)


def rows_in_a_chunk(n_rows: int, vocab_size: int, d_model: int, chunk_bytes: int | None = None) -> int:
    """Rows of a chunk, so that all chunks are about equal and none has more than `chunk_bytes` of float32 logits.

    Each chunk adds once to the (vocab_size, d_model) weight gradient, which costs as much as d_model / 2 rows of
    logits do: fewer rows than that would make the adding dominate. So the default is CHUNK_BYTES, or half the weight.
    """
    if chunk_bytes is None:
        chunk_bytes = max(CHUNK_BYTES, 4 * vocab_size * d_model // 2)
    most = max(1, chunk_bytes // (4 * vocab_size))
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


class _Result(NamedTuple):
    loss: Tensor
    n_correct: Tensor | None
    token_losses: Tensor | None
    grads: _Grads


def _forward_and_grads(
    hidden: Tensor, weight: Tensor, targets: Tensor, how: _Settings, want: tuple[bool, bool]
) -> _Result:
    """Loss sum, what else is asked for, and the gradients of the loss sum that `want` asks for."""
    dtype = how.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device) if how.count_correct else None
    token_losses = torch.empty(len(targets), dtype=wide, device=hidden.device) if how.per_token else None
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
        at = (torch.arange(len(y), device=y.device), y.clamp(min=0))
        logits = h @ w.t()
        slope: Tensor | None = None
        if how.softcap is not None:
            logits = logits.to(wide).div_(how.softcap).tanh_()
            slope = torch.addcmul(torch.ones((), dtype=wide, device=y.device), logits, logits, value=-1)
            logits = logits.mul_(how.softcap)
        if correct is not None:
            correct += (logits.argmax(-1) == y).sum()
        p = torch.log_softmax(logits, dim=-1, dtype=wide)
        del logits
        losses = p[at].neg_().masked_fill_(ignored[:, 0], 0)
        loss += losses.sum()
        if token_losses is not None:
            token_losses[chunk] = losses
        if not any(want):
            continue
        p.exp_()
        p[at] -= 1  # d loss / d logits = softmax - one-hot
        if slope is not None:
            p.mul_(slope)
        g = p.to(dtype)
        del p, slope
        if grad_hidden is not None:
            grad_hidden[chunk] = (g @ w).masked_fill_(ignored, 0)
        if want[1]:
            if grad_weight is None:
                grad_weight = (g.t() @ h).to(wide)
            elif dtype == wide:
                grad_weight.addmm_(g.t(), h)
            else:
                grad_weight += g.t() @ h
        del g
    if want[1]:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    return _Result(loss, correct, token_losses, _Grads(grad_hidden, grad_weight))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, how: _Settings, grad_enabled: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        want = (grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1])
        loss, correct, token_losses, ctx.grads = _forward_and_grads(hidden, weight, targets, how, want)
        if any(want):
            ctx.save_for_backward(hidden, weight, targets)
            ctx.settings = (_Settings(how.rows, how.dtype, how.softcap), want)
        ctx.mark_non_differentiable(*(t for t in (correct, token_losses) if t is not None))
        return loss, correct, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # The gradients are handed over, not kept: autograd then takes them as they are instead of copying the weight's
        # (150 MB for a small model). Only a second backward through a retained graph has to compute them again.
        grads = ctx.grads or _forward_and_grads(*ctx.saved_tensors, *ctx.settings).grads
        ctx.grads = None
        if grad.device.type != "cpu" or float(grad) != 1.0:
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None)
