"""Which attention kernel a forward uses, and why."""

from typing import NamedTuple

from llmtrain.errors import UserError
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.interface import Kernel, Visibility
from llmtrain.model.kernels.sdpa import SDPA


class Choice(NamedTuple):
    """A kernel and one line for the log."""

    kernel: Kernel
    reason: str


def select(attn_impl: str, seen: Visibility, *, dropout: bool = False, softcap: bool = False) -> Choice:
    """The kernel for `attn_impl` and this forward.

    Args:
        attn_impl: `model.attn_config.attn_impl`.
        seen: what is attended to: lengths, device, dtype, masks.
        dropout: whether attention weights are dropped out.
        softcap: whether scores are soft-capped.

    Raises:
        UserError: that kernel does not exist, is not installed, or cannot compute what is asked for.
    """
    if softcap and attn_impl == "auto":
        return Choice(EAGER, "attn_impl auto -> eager: torch's fused attention has no soft-capping")
    if softcap and attn_impl in ("sdpa", "torch", "triton"):
        raise UserError(
            f"attn_config.attn_impl: {attn_impl} has no soft-capping (attn_logit_softcapping); set it to auto"
        )
    match attn_impl:
        case "auto":
            device = seen.device.type
            return Choice(SDPA, f"attn_impl auto -> sdpa: torch's fused attention, the fastest kernel for {device}")
        case "eager":
            return Choice(EAGER, "attn_impl eager: the reference implementation, slow and memory-hungry")
        case "sdpa":
            return Choice(SDPA, "attn_impl sdpa: as asked for")
        case "torch" | "triton":
            return Choice(SDPA, f"attn_impl {attn_impl} is llm-foundry's name -> sdpa, which computes the same")
    raise UserError(f"attn_config.attn_impl: {attn_impl!r} is unknown; set it to auto, sdpa or eager")
