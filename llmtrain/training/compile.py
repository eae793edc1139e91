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
from torch import nn

from llmtrain.errors import UserError
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import CompileConfig

VARIANTS = 64
"""Variants of the block that are kept: training, evaluation, other lengths, other kinds of masks. torch's own limit is
8, and beyond it torch says nothing (or, with `fullgraph`, stops) and goes on uncompiled."""


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
        block.forward = _compiled(block.forward, how)
    return len(blocks)


def _compiled(forward: Callable[..., Any], how: dict[str, Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, **how)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # With a cache everything changes at each token; MPT passes it as the third argument, None when there is none.
        if len(args) > 2 and args[2] is not None:
            return forward(*args, **kwargs)
        return compiled(*args, **kwargs)

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
    attention = model.config.attn_config
    if device.type == "cpu" and attention.attn_uses_sequence_id and attention.attn_impl in ("sdpa", "torch", "triton"):
        raise UserError(
            f"compile_config: attn_impl {attention.attn_impl} takes packed documents one by one on a CPU, and would be "
            "compiled again for each batch; set attn_config.attn_impl to blockwise (or auto), or remove compile_config"
        )
