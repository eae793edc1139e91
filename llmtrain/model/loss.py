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


def shift(labels: Tensor) -> Tensor:
    """Targets of a causal model: position t is to predict labels[:, t + 1], the last position nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_bytes: int | None = None, count_correct: bool = False
) -> TokenLoss:
    """Cross-entropy of logits = hidden @ weight.T against targets, in chunks of rows.

    Args:
        hidden: (..., d_model).
        weight: (vocab_size, d_model), the embedding matrix or an untied head.
        targets: integers in the shape of `hidden` less its last dimension; IGNORED ones do not count.
        chunk_bytes: size of a chunk's float32 logits; one chunk if all fits. None: see `rows_in_a_chunk`.
        count_correct: also count where the largest logit is the target's.

    Inside autocast the matmuls run in autocast's dtype; softmax and sums in float32 at least. No target counts: the
    loss is 0 and so are the gradients.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    n_targets = (targets != IGNORED).sum()
    if hidden.device.type == "cpu" and int(n_targets) < 0.9 * len(targets):
        # Rows that do not count need no logits. (On an accelerator, asking for the number would stall the queue.)
        counted = (targets != IGNORED).nonzero().squeeze(1)
        hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    rows = rows_in_a_chunk(len(targets), weight.shape[0], weight.shape[1], chunk_bytes)
    with torch.autocast(kind, enabled=False):
        loss_sum, n_correct = _ChunkedCrossEntropy.apply(
            hidden, weight, targets, rows, dtype, count_correct, torch.is_grad_enabled()
        )
    return TokenLoss(loss_sum, n_targets, n_correct if count_correct else None)


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


class _Grads(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None


def _forward_and_grads(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, count: bool, want: tuple[bool, bool]
) -> tuple[Tensor, Tensor, _Grads]:
    """Loss sum, number of correct predictions, and the gradients of the loss sum that `want` asks for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden) if want[0] else None
    grad_weight: Tensor | None = None
    w = weight.to(dtype)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        y = targets[chunk]
        ignored = (y == IGNORED)[:, None]
        # An ignored row is made 0 before the matmul: whatever stood there, its logits are finite and its part of the
        # weight gradient is 0, without a pass over the logits.
        h = hidden[chunk].to(dtype).masked_fill(ignored, 0)
        at = (torch.arange(len(y), device=y.device), y.clamp(min=0))
        logits = h @ w.t()
        if count:
            correct += (logits.argmax(-1) == y).sum()
        p = torch.log_softmax(logits, dim=-1, dtype=wide)
        del logits
        loss -= p[at].masked_fill(ignored[:, 0], 0).sum()
        if not any(want):
            continue
        p.exp_()
        p[at] -= 1  # d loss / d logits = softmax - one-hot
        g = p.to(dtype)
        del p
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
    return loss, correct, _Grads(grad_hidden, grad_weight)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        dtype: torch.dtype,
        count: bool,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        want = (grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1])
        loss, correct, ctx.grads = _forward_and_grads(hidden, weight, targets, rows, dtype, count, want)
        if any(want):
            ctx.save_for_backward(hidden, weight, targets)
            ctx.settings = (rows, dtype, False, want)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The gradients are handed over, not kept: autograd then takes them as they are instead of copying the weight's
        # (150 MB for a small model). Only a second backward through a retained graph has to compute them again.
        grads = ctx.grads or _forward_and_grads(*ctx.saved_tensors, *ctx.settings)[2]
        ctx.grads = None
        if grad.device.type != "cpu" or float(grad) != 1.0:
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None, None, None)
