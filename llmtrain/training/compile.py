"""torch.compile, block by block.

All blocks are the same code, so one of them is compiled and the others use what came out: a minute instead of the many
that a whole model takes. What is compiled is a block's `forward`, with activation checkpointing inside of it; FSDP's
hooks, which gather parameters, are set later and lie around it. Names of parameters stay what they are.
"""

import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from llmtrain.errors import UserError
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.cache import KVCache
from llmtrain.model.kernels.interface import Attention
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import CompileConfig

VARIANTS = 64
"""Variants of the block that are kept: training, evaluation, other lengths, other kinds of masks. torch's own limit is
8, and beyond it torch says nothing (or, with `fullgraph`, stops) and goes on uncompiled."""

KEEPS_WHAT_IT_COMPILED = TorchVersion(torch.__version__) >= "2.11"
"""Torch 2.7 compiles a block anew when an object that an earlier call took is gone, as each batch's attention is; 2.11
does not (versions between were not tried)."""


def compile_blocks(model: MPT | HFCausalLM, config: CompileConfig | None, device: torch.device) -> int:
    """Compiles the forward of each block in place; generation with a cache stays uncompiled.

    Args:
        model: after activation checkpointing was applied to it, and before it is sharded.
        config: `compile_config`; None compiles nothing.
        device: where it will run.

    Returns:
        The number of blocks.

    Raises:
        UserError: the compiler does not exist here, or would start over for each batch.
    """
    if config is None or config.disable:
        return 0
    _check(model, config, device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    how: dict[str, Any] = config.model_dump(exclude={"disable", "fullgraph"})
    # Blocks of MPT are known to be one graph. Those of other models may be several.
    how["fullgraph"] = isinstance(model, MPT) if config.fullgraph is None else config.fullgraph
    blocks = [module for module in model.modules() if model.activation_checkpointing_fn(module)]
    for block in blocks:
        compiled = torch.compile(block.forward, **how)
        block.forward = _unless_cached(block.forward, compiled) if isinstance(model, MPT) else compiled
    return len(blocks)


def _unless_cached(plain: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With a cache of keys and values a block of MPT stays uncompiled: there everything changes at each token."""

    @wraps(plain)
    def run(x: Tensor, attend: Attention, cache: KVCache | None = None) -> Tensor:
        return compiled(x, attend) if cache is None else plain(x, attend, cache)

    return run


def _check(model: nn.Module, config: CompileConfig, device: torch.device) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if config.backend not in known:
        raise UserError(
            f"compile_config.backend: {config.backend!r} is not there; set it to inductor (known: {', '.join(known)})"
        )
    if config.backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError(
            "compile_config: torch.compile needs a C++ compiler on the CPU, and there is none; install g++, or remove "
            "compile_config"
        )
    if not isinstance(model, MPT):
        return
    if not KEEPS_WHAT_IT_COMPILED:
        raise UserError(
            f"compile_config: torch {torch.__version__} would compile MPT's blocks again for each batch; take torch "
            "2.11 or newer, or remove compile_config"
        )
    attention = model.config.attn_config
    if device.type == "cpu" and attention.attn_uses_sequence_id and attention.attn_impl in ("sdpa", "torch", "triton"):
        raise UserError(
            f"compile_config: attn_impl {attention.attn_impl} takes packed documents one by one on a CPU, and would be "
            "compiled again for each batch; set attn_config.attn_impl to blockwise (or auto), or remove compile_config"
        )
