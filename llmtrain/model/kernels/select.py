"""Which attention kernel a forward uses, and why."""

from typing import Literal, NamedTuple

import torch

from llmtrain.errors import UserError
from llmtrain.model.kernels.blockwise import BLOCKWISE
from llmtrain.model.kernels.dense import LONGEST
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.interface import Kernel, Visibility
from llmtrain.model.kernels.sdpa import SDPA

FLEX_FROM = 1024
"""Queries from which on `auto` takes FlexAttention on a GPU: below (short prompts, tokens behind a cache) a dense
bias is small, and nothing has to be compiled."""
NAMES = ("auto", "eager", "sdpa", "blockwise", "flex", "flash")


class Choice(NamedTuple):
    """A kernel and one line for the log."""

    kernel: Kernel
    reason: str


def select(
    attn_impl: str,
    seen: Visibility,
    *,
    dropout: bool = False,
    softcap: bool = False,
    flex_backend: Literal["triton", "flash"] = "triton",
) -> Choice:
    """The kernel for `attn_impl` and this forward.

    Args:
        attn_impl: `model.attn_config.attn_impl`.
        seen: what is attended to: lengths, device, dtype, masks.
        dropout: whether attention weights are dropped out.
        softcap: whether scores are soft-capped.
        flex_backend: `model.attn_config.flex_backend`.

    Raises:
        UserError: that kernel does not exist, is not installed, or cannot compute what is asked for.
    """
    if softcap and attn_impl in ("sdpa", "torch", "triton"):
        raise UserError(
            f"attn_config.attn_impl: {attn_impl} is torch's fused attention, which has no soft-capping "
            "(attn_logit_softcapping); set it to auto, eager, blockwise or flex"
        )
    if dropout and attn_impl == "blockwise":
        raise UserError("attn_config.attn_impl: blockwise has no dropout (attn_pdrop); set it to auto, eager or sdpa")
    match attn_impl:
        case "auto":
            kernel, reason = _automatic(seen, dropout, softcap)
            return Choice(kernel, f"attn_impl auto -> {kernel.name}: {reason}")
        case "eager":
            return Choice(EAGER, "attn_impl eager: the reference implementation, slow and memory-hungry")
        case "sdpa":
            return Choice(SDPA, "attn_impl sdpa: as asked for")
        case "blockwise":
            return Choice(BLOCKWISE, "attn_impl blockwise: as asked for")
        case "flex":
            return Choice(_flex(seen, dropout, flex_backend), "attn_impl flex: as asked for")
        case "flash":
            return Choice(_flash(seen), "attn_impl flash: as asked for")
        case "torch" | "triton":
            return Choice(SDPA, f"attn_impl {attn_impl} is llm-foundry's name -> sdpa, which computes the same")
    raise UserError(f"attn_config.attn_impl: {attn_impl!r} is unknown; set it to {', '.join(NAMES)}")


def _flex(seen: Visibility, dropout: bool, backend: str) -> Kernel:
    """FlexAttention, or UserError. Imported here: it takes seconds, and most runs on a CPU do without."""
    from llmtrain.model.kernels import flex

    if dropout:
        raise UserError("attn_config.attn_impl: flex has no dropout (attn_pdrop); set it to auto, sdpa or flash")
    if problem := flex.missing(seen.device, backend):
        raise UserError(problem)
    return flex.FLEX_FLASH if backend == "flash" else flex.FLEX


def _flash(seen: Visibility) -> Kernel:
    """flash-attn, or UserError."""
    from llmtrain.model.kernels import flash

    if seen.device.type != "cuda":
        raise UserError(
            f"attn_config.attn_impl: flash (the flash-attn package) needs a CUDA device, and this run is on "
            f"{seen.device.type}; set it to auto"
        )
    if problem := flash.missing():
        raise UserError(problem)
    return flash.FLASH


def _flex_is_there(seen: Visibility) -> bool:
    from llmtrain.model.kernels import flex

    return flex.missing(seen.device) is None


def _flash_suits(seen: Visibility) -> bool:
    """Whether flash-attn is installed and surely takes this.

    Not with padding, whose real tokens it wants in one piece, and not in versions that could not be compiled.
    """
    from llmtrain.model.kernels import flash

    lengths = min(seen.n_queries, seen.n_keys) >= FLEX_FROM
    takes_it = lengths and seen.padding is None and seen.device.type == "cuda" and seen.dtype in flash.LOW_PRECISION
    return takes_it and flash.missing() is None and flash.suits_auto(seen.device)


def _automatic(seen: Visibility, dropout: bool, softcap: bool) -> tuple[Kernel, str]:
    """The fastest exact kernel, and why.

    On a CPU that is blockwise for every length: up to one block of queries it is one call of the same fused kernel that
    sdpa would call, without a bias of (heads, T, T); beyond that it skips what cannot be seen. A single query, as in
    generation, needs no blocks: sdpa with one row of bias, which blockwise would make anew in each layer, in pieces.

    On a GPU, where scores need more than causality, it is flex, also if flash-attn is installed: flex finds ALiBi
    windows without waiting for the device (flash-attn has to, in each layer), drops single blocks instead of heads,
    keeps windows in compiled blocks, and takes documents and padding as they come. flash-attn is taken where flex
    cannot be: with dropout, or without Triton. Which is faster where both can has not been measured.
    """
    device = seen.device.type
    plain = seen.slopes is None and seen.padding is None and seen.documents is None and seen.window is None
    if dropout and not softcap and not plain and _flash_suits(seen):
        return _flash(seen), "the kernel with dropout that needs no T x T bias"
    if dropout:
        return (EAGER, "soft-capping with dropout") if softcap else (SDPA, "the fastest kernel with dropout")
    if device == "cpu" and seen.n_queries == 1 and not softcap:
        return SDPA, "one query: its row of the bias is made once for all layers"
    if device == "cpu":
        return BLOCKWISE, "exact, with memory of O(T), and the fastest kernel for cpu"
    # A chunk of a prompt behind a cache is neither the whole triangle nor one row: it would take a dense bias.
    if plain and not softcap and seen.n_queries in (1, seen.n_keys):
        return SDPA, f"torch's fused causal attention, the fastest kernel for {device} without a bias"
    if min(seen.n_queries, seen.n_keys) >= FLEX_FROM and seen.dtype != torch.float64 and _flex_is_there(seen):
        return _flex(seen, dropout, "triton"), "block-sparse and compiled: no T x T bias, ALiBi windows"
    if _flash_suits(seen):
        return _flash(seen), "no T x T bias, ALiBi windows (flex would need Triton)"
    if softcap or seen.n_queries * seen.n_keys > LONGEST**2 or seen.dtype == torch.float64:
        return BLOCKWISE, "no fused kernel here takes this length or soft-capping"
    return SDPA, f"torch's fused attention, the fastest kernel installed for {device}"
