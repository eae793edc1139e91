"""What a forward does not keep for its backward: recomputed, or moved to host memory.

Composer does this only to models that FSDP shards, and wraps modules, which changes the names of their parameters.
Here the `forward` of a module is replaced: names stay, FSDP's hooks (set afterwards) lie around what is recomputed, and
it works in a single process and under DDP as well.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT

Checkpointing = Literal["none", "full", "selective"]

_ATTENTION_NAMESPACES = ("llmtrain", "flash_attn")
"""Custom operators of ours and of flash-attn that compute attention have it in their names."""

_SMALL = 1 << 16
"""Elements below which a tensor is not worth a copy to the host."""


def apply(model: MPT | HFCausalLM, checkpointing: Checkpointing, *, offload: bool = False) -> int:
    """Changes the modules that `activation_checkpointing_target` names (by default the blocks), in place.

    Args:
        model: before it is sharded or compiled.
        checkpointing: `full` recomputes all of a module from its input; `selective` keeps what attention gives and
            recomputes the rest: projections, norms, activations.
        offload: what is kept lies in host memory between forward and backward; does nothing on a CPU.

    Returns:
        The number of modules.
    """
    if checkpointing == "none" and not offload:
        return 0
    targets = list(_targets(model))
    for module in targets:
        forward = module.forward
        if checkpointing != "none":
            forward = _recomputed(forward, selective=checkpointing == "selective", offload=offload)
        if offload:
            forward = _offloaded(forward)
        module.forward = forward
    return len(targets)


def _targets(model: MPT | HFCausalLM) -> Iterator[nn.Module]:
    if isinstance(model, HFCausalLM):
        yield from (module for module in model.modules() if model.activation_checkpointing_fn(module))
        return
    parts = model.config.checkpointing_parts()
    blocks: Iterable[Any] = model.transformer.blocks
    for number, block in enumerate(blocks):
        inside: list[nn.Module] = []
        if number in parts.get("attn", ()):
            inside += [block.attn, *(norm for norm in (block.norm_1, block.norm_2) if number in parts.get("norms", ()))]
        elif number in parts.get("norms", ()):
            norms = (block.norm_1, block.norm_2, block.attn.q_ln, block.attn.k_ln)
            inside += [norm for norm in norms if norm is not None]
        if number in parts.get("ffn", ()):
            inside.append(block.ffn)
        yield from [block] if number in parts.get("block", ()) else inside


def _recomputed(forward: Callable[..., Any], *, selective: bool, offload: bool) -> Callable[..., Any]:
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps_attention)
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # torch 2.7 has it not
            how["respect_saved_tensors_hooks"] = offload

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The random state is kept, so that dropout is the same when it is recomputed.
        return checkpoint(forward, *args, **how, **kwargs)

    return run


def _keeps_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # With dropout it is recomputed: left out, it would draw no random numbers, and the dropouts after it others.
    kept = is_attention(op) and not _drops_out(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _drops_out(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in op._schema.arguments] if isinstance(op, torch._ops.OpOverload) else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("dropout_p", 0.0))


def is_attention(op: Any) -> bool:
    """Whether an operator is attention as a whole: torch's fused ones, flex attention, and custom ones."""
    if isinstance(op, torch._ops.HigherOrderOperator):
        return str(op) == "flex_attention"
    namespace, _, name = op.name().partition("::")
    if "backward" in name:
        return False
    if namespace == "aten":
        return str(name).startswith("_scaled_dot_product_") and "attention" in name
    return namespace in _ATTENTION_NAMESPACES and ("attention" in name or "attn" in name)


def _offloaded(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_to_host, _to_device):
            return forward(*args, **kwargs)

    return run


def _to_host(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """Parameters stay: they are on the device anyway (torch's save_on_cpu would copy them)."""
    base = saved._base if saved._is_view() else saved
    if saved.device.type == "cpu" or isinstance(base, nn.Parameter) or saved.numel() < _SMALL:
        return saved
    # Not waited for: the copy back is queued behind it on the same stream.
    host = torch.empty(saved.size(), dtype=saved.dtype, layout=saved.layout, pin_memory=True)
    host.copy_(saved, non_blocking=True)
    return saved.device, host


def _to_device(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
