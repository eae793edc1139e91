"""From hidden states to logits or loss, as the architecture does it, without ever holding all logits.

Most heads are a matrix, and MPT's chunked cross-entropy takes that matrix. Some do more: a bias, logits that are
scaled (Cohere, Granite) or softly capped (Gemma), adapters on the head. Those go through the head itself, a chunk of
rows at a time, and each chunk is computed again in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llmtrain.model.loss import IGNORED, rows_in_a_chunk
from llmtrain.model.mpt import MPTOutput, logits_or_loss


class Head(nn.Linear):
    """A plain head without bias; a module of its own, so that FSDP gathers its weight when it is called."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, *, token_losses: bool = False
    ) -> MPTOutput:
        """Logits or loss of (batch, T, hidden_size) hidden states."""
        return logits_or_loss(hidden, self.weight, targets, count_correct=not self.training, token_losses=token_losses)


def logit_scale(config: Any) -> float:
    """What the architecture multiplies its logits with.

    Cohere: `logit_scale`; Granite divides by `logits_scaling`; Falcon-H1: `lm_head_multiplier`. Others that have such a
    key ignore it (transformers' MPT), so the name of the architecture decides.
    """
    kind = str(config.model_type)
    if kind.startswith("cohere"):
        return float(config.logit_scale)
    if kind.startswith("granite"):
        return 1.0 / float(config.logits_scaling)
    if kind == "falcon_h1":
        return float(config.lm_head_multiplier)
    return 1.0


def logit_cap(config: Any) -> float | None:
    """The cap c of logits = c * tanh(logits / c) (Gemma 2, arXiv:2408.00118), or None."""
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


def general_output(
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: Tensor | None,
    vocab_size: int,
    *,
    count: bool,
    token_losses: bool = False,
) -> MPTOutput:
    """What `logits_or_loss` gives, for any function from hidden states (rows, hidden_size) to logits (rows, vocab).

    Args:
        hidden: (batch, T, hidden_size).
        logits_of: the head.
        targets: (batch, T), -100 where ignored, or None for the logits.
        vocab_size: decides how many rows are a chunk.
        count: also count the targets that have the largest logit.
        token_losses: also give the loss of each target.
    """
    if targets is None:
        return MPTOutput(logits=logits_of(hidden))
    shape, targets = targets.shape, targets.flatten()
    rows = hidden.flatten(0, -2)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    size = rows_in_a_chunk(len(targets), vocab_size, rows.shape[-1])
    loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)

    losses: list[Tensor] = []
    founds: list[Tensor] = []

    def of_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits_of(h).to(wide)
        found = logits.detach().argmax(-1) == y if count else torch.zeros_like(y, dtype=torch.bool)
        each = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="none")
        return each.sum(), found, each.detach()

    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        part, found, each = checkpoint(of_chunk, rows[chunk], targets[chunk], use_reentrant=False)
        loss_sum = loss_sum + part
        correct = correct + found.sum()
        losses.append(each)
        founds.append(found)
    n_targets = (targets != IGNORED).sum()
    by_token = torch.cat(losses).view(shape) if token_losses else None
    right = torch.cat(founds).view(shape) if token_losses and count else None
    mean = loss_sum / n_targets.clamp(min=1)
    return MPTOutput(None, mean, loss_sum, n_targets, correct if count else None, by_token, right)
