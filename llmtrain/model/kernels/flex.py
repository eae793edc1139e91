"""torch's FlexAttention: one compiled kernel for ALiBi, documents, padding and windows, block-sparse, memory O(T).

Who sees whom is decided for blocks of positions from what is known of each block (first and last position, lowest and
highest document number), never from a T x T mask: `static_blocks`. A block is skipped, or computed with the mask
evaluated in it, or computed plainly where the mask is all true. With ALiBi windows each layer drops the key blocks
that are too far for each head (`windows.py`), on the device and without waiting for it.

Training needs a GPU: FlexAttention has no backward pass on the CPU, and its forward there is only a reference. This
module takes a second or two to import (dynamo), so `select` imports it when it is wanted.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.attention.flex_attention as flex_attention_module
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._triton import has_triton

from llmtrain.errors import UserError
from llmtrain.model.kernels.alibi_window import negligible
from llmtrain.model.kernels.interface import Kernel, Visibility
from llmtrain.model.kernels.windows import LONG, kept_blocks, measure

log = logging.getLogger(__name__)

Mod = Callable[..., Tensor]

BLOCK = 128
"""Positions of a block: FlexAttention's own default, and a multiple of all its tiles."""
WIDE_BLOCK = 256
"""Positions of a block from WIDE tokens on, where lists of blocks of 128 would take 128 MB a layer (32 heads)."""
WIDE = 65536
SMALLEST_HEAD = 16
"""FlexAttention's GPU kernels take no smaller head_dim."""


class BlockKinds(NamedTuple):
    """For each pair of blocks, (1 or batch, 1, query blocks, key blocks) bool."""

    some: Tensor
    """Somebody may see somebody (true where that is not known)."""
    every: Tensor
    """All queries see all keys. Implies `some`."""


class FlexMask:
    """What `prepare` hands to every layer of a forward."""

    def __init__(self, seen: Visibility) -> None:
        self.shape = (seen.n_queries, seen.n_keys)
        self.block = WIDE_BLOCK if seen.n_keys >= WIDE else BLOCK
        self.first = seen.n_keys - seen.n_queries
        # A tensor, as it grows with each generated token, and a number would be compiled into the kernel.
        self.offset = torch.full((), self.first, dtype=torch.int32, device=seen.device) if self.first else None
        wide = torch.float64 if seen.dtype == torch.float64 else torch.float32
        self.slopes = None if seen.slopes is None else torch.tensor(seen.slopes, device=seen.device, dtype=wide)
        self.mask_mod = mask_mod(seen, self.offset)
        self.kinds = static_blocks(seen, self.block)
        # A token that is generated reads all keys once: measuring them would be as much again.
        long = seen.n_keys >= LONG and seen.n_queries >= self.block
        self.windows = seen.skip_far_keys and seen.slopes is not None and long
        self.margin = None
        if self.windows:
            self.margin = torch.full((), negligible(wide, seen.n_keys), dtype=wide, device=seen.device)
        self.blocks = None if self.windows else _block_mask(self, *_lists(self.kinds.some, self.kinds.every))


def mask_mod(seen: Visibility, offset: Tensor | None) -> Mod:
    """`Visibility` as FlexAttention wants it: may query q_index of that row see key k_index?"""
    padding, documents, window = seen.padding, seen.documents, seen.window

    def visible(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        i = q_index if offset is None else q_index + offset
        sees = k_index <= i
        if window is not None:
            sees = sees & (i - k_index <= window)
        if padding is not None or documents is not None:
            among = k_index == i
            if documents is None:
                among = among | padding[b, k_index]  # type: ignore[index]
            elif padding is None:
                among = among | (documents[b, i] == documents[b, k_index])
            else:
                among = among | (padding[b, k_index] & (documents[b, i] == documents[b, k_index]))
            sees = sees & among
        return sees

    return visible


def score_mod(slopes: Tensor | None, offset: Tensor | None, softcap: str | None) -> Mod | None:
    """Soft-capping, then ALiBi by distance, in the scores' float32; None when there is neither."""
    if slopes is None and softcap is None:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        if softcap is not None:
            score = torch.tanh(score / float(softcap)) * float(softcap)
        if slopes is not None:
            i = q_index if offset is None else q_index + offset
            score = score + slopes[h] * (k_index - i).to(slopes.dtype)
        return score

    return modified


def static_blocks(seen: Visibility, block: int) -> BlockKinds:
    """Block by block what `mask_mod` says pair by pair, in the memory of (T / block)^2."""
    first, n = seen.n_keys - seen.n_queries, seen.n_keys
    n_q, n_k = -(-seen.n_queries // block), -(-n // block)
    q_low = first + block * torch.arange(n_q, device=seen.device)[:, None]
    q_high = (q_low + block - 1).clamp(max=n - 1)
    k_low = block * torch.arange(n_k, device=seen.device)[None, :]
    k_high = (k_low + block - 1).clamp(max=n - 1)
    some, every = k_low <= q_high, k_high <= q_low
    # Blocks that stick out at the end are never computed plainly, as create_block_mask has it, too.
    every = every & (q_low + block - 1 <= n - 1) & (k_low + block - 1 <= n - 1)
    if seen.window is not None:
        some, every = some & (q_low - k_high <= seen.window), every & (q_high - k_low <= seen.window)
    some, every = some[None, None], every[None, None]
    if seen.padding is None and seen.documents is None:
        return BlockKinds(some, every)
    some_among, every_among = torch.ones_like(some), torch.ones_like(some)
    if seen.padding is not None:
        real = _grouped(seen.padding, 0, n_k, block, False)
        all_real = _grouped(seen.padding, 0, n_k, block, True)
        some_among = some_among & real.any(-1)[:, None, None, :]
        every_among = every_among & all_real.all(-1)[:, None, None, :]
    if seen.documents is not None:
        # Padding stands behind a row's documents, and its -1 would make its block's range reach over all of them.
        top = torch.iinfo(seen.documents.dtype).max
        numbers = seen.documents.where(seen.documents >= 0, top)
        k_least = _grouped(numbers, 0, n_k, block, top).amin(-1)[:, None, None, :]
        k_most = _grouped(numbers, 0, n_k, block, -1).amax(-1)[:, None, None, :]
        q_least = _grouped(numbers, first, n_q, block, top).amin(-1)[:, None, :, None]
        q_most = _grouped(numbers, first, n_q, block, -1).amax(-1)[:, None, :, None]
        some_among = some_among & (q_least <= k_most) & (k_least <= q_most)
        every_among = every_among & (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    itself = (q_low <= k_high) & (k_low <= q_high)
    return BlockKinds(some & (some_among | itself), every & every_among)


def _grouped(x: Tensor, first: int, n_blocks: int, block: int, filler: int) -> Tensor:
    """(batch, T) from position `first` on as (batch, n_blocks, block), filled up at the end."""
    x = x[:, first:]
    rest = x.new_full((len(x), n_blocks * block - x.shape[1]), filler)
    return torch.cat((x, rest), dim=1).view(len(x), n_blocks, block)


class _Lists(NamedTuple):
    """How FlexAttention takes blocks: for each row of blocks how many, and which (the first so many of a list)."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def _lists(some: Tensor, every: Tensor) -> _Lists:
    """Lists of the blocks to mask and of the plain ("full") ones, by query block and, for backward, by key block."""
    partial = some & ~every
    turned = partial.transpose(-2, -1), every.transpose(-2, -1)
    return _Lists(*_listed(partial), *_listed(every), *_listed(turned[0]), *_listed(turned[1]))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) bool -> the number of true ones (...), and a permutation of the n columns with those first, in order.

    What a stable sort would give, for the price of a sum: lists are made anew in each layer.
    """
    n = chosen.shape[-1]
    columns = torch.arange(n, device=chosen.device)
    rank = chosen.cumsum(-1)  # of the true ones up to here
    total = rank[..., -1:]
    place = torch.where(chosen, rank - 1, total + columns - rank)
    indices = torch.empty_like(place, dtype=torch.int32, memory_format=torch.contiguous_format)
    indices.scatter_(-1, place, columns.to(torch.int32).expand_as(place))
    return total[..., 0].to(torch.int32, memory_format=torch.contiguous_format), indices


def _block_mask(mask: FlexMask, *lists: Tensor) -> BlockMask:
    size = (mask.block, mask.block)
    fields: dict[str, Any] = dict(zip(_Lists._fields, lists, strict=True))
    return BlockMask(seq_lengths=mask.shape, BLOCK_SIZE=size, mask_mod=mask.mask_mod, **fields)


# Compiled functions take numbers as text. Dynamo takes a number that has changed (another model in the same process)
# for a variable, which FlexAttention's modifications cannot hold, and text for a constant.


def _window_lists(
    q: Tensor,
    k: Tensor,
    some: Tensor,
    every: Tensor,
    slopes: Tensor,
    margin: Tensor,
    block: str,
    scale: str,
    softcap: str | None,
) -> _Lists:
    """The lists for each head, less the blocks that are too far away for it."""
    size, cap = int(block), None if softcap is None else float(softcap)
    bounds = measure(q, k, float(scale), size, softcap=cap)
    kept = kept_blocks(bounds, slopes, size, k.shape[2] - q.shape[2], margin, cap)
    return _lists(some & kept, every & kept)


def _attend_square(
    q: Tensor, k: Tensor, v: Tensor, mod: Mod | None, blocks: BlockMask, scale: str, options: Any
) -> Any:
    """As many queries as keys: training, and prompts."""
    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, mod, blocks, float(scale), gqa, kernel_options=options)


def _attend_behind(
    q: Tensor, k: Tensor, v: Tensor, mod: Mod | None, blocks: BlockMask, scale: str, options: Any
) -> Any:
    """Behind a cache. Another function, so that lengths that grow there do not become variables in training."""
    gqa = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, mod, blocks, float(scale), gqa, kernel_options=options)


VARIANTS = 64
"""Variants of a compiled function that dynamo may keep: dtypes, kinds of mask, training or not, softcap or not. At its
own limit of 8 it would go on uncompiled, which computes all T x T scores; with `fullgraph` it stops instead."""


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function`, compiled once a process: for a GPU by inductor; on the CPU (a reference) by dynamo alone.

    `dynamic` is left open: the first length is compiled as a constant, the best code for training; from a second
    length on, lengths are variables.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(function, fullgraph=True, backend="inductor" if device != "cpu" else "eager")


def _call(function: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return function(*args)  # part of what is being compiled
    compiled = _compiled(function, args[0].device.type)
    if not torch._C._len_torch_dispatch_stack():
        return compiled(*args)
    # Selective activation checkpointing watches each operator, and torch compiles nothing while it does: all T x T
    # scores would be computed. So it does not see this one, and attention is recomputed with the rest.
    if not _MODES_CAN_BE_LEFT:
        raise UserError(
            f"fsdp_config.activation_checkpointing: selective does not go together with attn_impl flex on torch "
            f"{torch.__version__}; set it to true, or set compile_config, or update torch to 2.11 or newer"
        )
    _say_that_attention_is_recomputed()
    with _disable_current_modes():
        return compiled(*args)


_MODES_CAN_BE_LEFT = TorchVersion(torch.__version__) >= "2.11"


@cache
def _say_that_attention_is_recomputed() -> None:
    """Once a process."""
    log.warning(
        "attn_impl flex: selective activation checkpointing can keep attention's results only in compiled blocks; "
        "without compile_config they are recomputed"
    )


def _attend_with(options: dict[str, Any] | None) -> Callable[..., Tensor]:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: FlexMask,
        /,
        *,
        softmax_scale: float,
        dropout_p: float,
        softcap: float | None,
    ) -> Tensor:
        _check(q, k, v, dropout_p)
        if q.device.type == "cpu":
            q, k, v = q.detach(), k.detach(), v.detach()  # it looks at requires_grad even where no gradient is wanted
        scale, cap, blocks = str(softmax_scale), None if softcap is None else str(softcap), mask.blocks
        if blocks is None:
            with torch.no_grad():
                known = (*mask.kinds, mask.slopes, mask.margin)
                lists = _call(_window_lists, q, k, *known, str(mask.block), scale, cap)
            blocks = _block_mask(mask, *lists)
        function = _attend_behind if mask.first else _attend_square
        mod = score_mod(mask.slopes, mask.offset, cap)
        head_dim = q.shape[-1]
        if head_dim < SMALLEST_HEAD:  # zeros change no score
            q, k, v = (F.pad(x, (0, SMALLEST_HEAD - head_dim)) for x in (q, k, v))
        out: Tensor = _call(function, q, k, v, mod, blocks, scale, options)
        return out[..., :head_dim]

    return attend


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    """Raise UserError for what FlexAttention cannot do."""
    if dropout_p:
        raise UserError(
            f"attn_config.attn_pdrop: {dropout_p}: FlexAttention has no dropout; set attn_pdrop to 0, or attn_impl to "
            "sdpa or flash"
        )
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if wanted and q.device.type == "cpu":
        raise UserError(
            "attn_config.attn_impl: flex cannot train on the CPU, as FlexAttention has no backward pass there; set it "
            "to blockwise (or auto)"
        )


def missing(device: torch.device, backend: str = "triton") -> str | None:
    """Why FlexAttention cannot be used on that device and what to do, or None."""
    if device.type == "cpu":
        return None  # a reference, without gradients
    if not has_triton():
        return (
            "attn_config.attn_impl: flex needs Triton and a GPU that it compiles for (`pip install triton`); set "
            "attn_impl to auto"
        )
    options = getattr(flex_attention_module, "FlexKernelOptions", None)
    if backend == "flash" and "BACKEND" not in getattr(options, "__annotations__", {}):
        return f"attn_config.flex_backend: torch {torch.__version__} has no flash backend; set it to triton"
    if backend == "flash" and not _has_flash_4():
        return (
            "attn_config.flex_backend: flash needs FlashAttention 4 (the package flash-attn-4, imported as "
            "flash_attn.cute), which is not installed; set it to triton"
        )
    return None


def _has_flash_4() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


FLEX = Kernel("flex", FlexMask, _attend_with(None))
FLEX_FLASH = Kernel("flex-flash", FlexMask, _attend_with({"BACKEND": "FLASH"}))
"""FlexAttention through FlashAttention 4's kernels. Experimental in torch, and slower to compile."""
