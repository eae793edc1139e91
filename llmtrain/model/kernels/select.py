"""Which attention kernel a run uses, and why."""

from functools import cache
from typing import NamedTuple

from llmtrain.errors import UserError
from llmtrain.model.config import NOT_YET_ATTENTION
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.interface import Kernel
from llmtrain.model.kernels.sdpa import SDPA


class Choice(NamedTuple):
    """A kernel and one line for the log."""

    kernel: Kernel
    reason: str


@cache
def select(attn_impl: str, device_type: str = "cpu") -> Choice:
    """The kernel for `attn_impl` on that type of device. Raises UserError for one that does not exist (yet)."""
    match attn_impl:
        case "auto":
            return Choice(
                SDPA, f"attn_impl auto -> sdpa: torch's fused attention, the fastest kernel built for {device_type}"
            )
        case "eager":
            return Choice(EAGER, "attn_impl eager: the reference implementation, slow and memory-hungry")
        case "sdpa":
            return Choice(SDPA, "attn_impl sdpa: as asked for")
        case "torch" | "triton":
            return Choice(SDPA, f"attn_impl {attn_impl} is llm-foundry's name -> sdpa, which computes the same")
    state = "is not supported yet" if attn_impl in NOT_YET_ATTENTION else "is unknown"
    raise UserError(f"attn_config.attn_impl: {attn_impl!r} {state}; set it to auto, sdpa or eager")
