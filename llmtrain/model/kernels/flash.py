"""The flash-attn package (FlashAttention 2, Dao 2023, arXiv:2307.08691): ALiBi, grouped heads, documents, dropout.

Packed documents and left padding become sequences of their own lengths (`flash_attn_varlen_func`). With ALiBi windows
the heads are sorted into a few groups by how far each has to look, and each group is one call with that window. The
package is optional; it takes bfloat16 and float16 on Ampere GPUs or newer.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.kernels.interface import Kernel, Visibility
from llmtrain.model.kernels.windows import LONG, measure, needed_windows

INSTALL = "pip install flash-attn --no-build-isolation"
OLDEST = (2, 6)
"""ALiBi came with 2.4, soft-capping with 2.6."""
OLDEST_COMPILED = (2, 7)
"""Its functions are custom ops, which torch.compile can take, since 2.7."""
MAX_GROUPS = 4
"""Calls for groups of heads with ALiBi windows: each reads its own heads only, but costs launches."""
LARGEST_HEAD = 256
LOW_PRECISION = (torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why flash-attn cannot be used in this environment and what to do, or None."""
    try:
        _functions()
    except UserError as error:
        return str(error)
    return None


@cache
def _functions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`flash_attn_func` and `flash_attn_varlen_func`; raises UserError without a usable flash-attn."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"attn_config.attn_impl: flash needs the flash-attn package, which cannot be imported here ({error}). "
            f"Install it with `{INSTALL}` (it is built against the torch that is installed), or set attn_impl to auto"
        ) from None
    if _version() < OLDEST:
        raise UserError(
            f"attn_config.attn_impl: flash needs flash-attn {'.'.join(map(str, OLDEST))} or newer, here is "
            f"{version('flash-attn')}. Install it anew with `{INSTALL} --upgrade`, or set attn_impl to auto"
        )
    return flash_attn_func, flash_attn_varlen_func


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("flash-attn").split(".")[:2])


def suits_auto(device: torch.device) -> bool:
    """Whether an installed flash-attn runs on that GPU (Ampere or newer), in compiled blocks as well."""
    return _version() >= OLDEST_COMPILED and torch.cuda.get_device_capability(device) >= (8, 0)


class FlashMask:
    """What `prepare` hands to every layer of a forward."""

    def __init__(self, seen: Visibility) -> None:
        if seen.dtype not in LOW_PRECISION:
            raise UserError(
                f"attn_config.attn_impl: flash computes in bfloat16 or float16 only, and here q, k and v are "
                f"{str(seen.dtype).removeprefix('torch.')}; set precision to amp_bf16, or attn_impl to auto"
            )
        self.whole, self.varlen = _functions()
        self.compilable = _version() >= OLDEST_COMPILED
        self.slopes = None
        if seen.slopes is not None:
            self.slopes = torch.tensor(seen.slopes, dtype=torch.float32, device=seen.device)
        self.window = -1 if seen.window is None else seen.window
        self.n_keys = seen.n_keys
        # Choosing windows waits for the device once a layer: not worth it for the few queries behind a cache.
        self.far_keys = seen.slopes is None or not seen.skip_far_keys or min(seen.n_queries, seen.n_keys) < LONG
        self.sequences = _sequences(seen)


class Sequences:
    """A batch as sequences one behind another, for `flash_attn_varlen_func`."""

    def __init__(self, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int) -> None:
        self.q_ends = q_ends
        """(sequences + 1,) int32: where the queries of each begin, and the end."""
        self.k_ends = k_ends
        self.longest_q = longest_q
        """No sequence has more queries. Rounded up, so that few different values are compiled."""
        self.longest_k = longest_k


def _sequences(seen: Visibility) -> Sequences | None:
    """Documents and runs of padding as sequences of their own, or None where rows are whole.

    A run of padding is one more sequence: it sees itself (nobody uses what comes out), and nobody else sees it.

    Raises UserError for rows that are no sequences: a document, or the real tokens of a padded row, in several pieces.
    """
    if seen.documents is None and seen.padding is None:
        return None
    if seen.documents is None:
        assert seen.padding is not None
        kind = seen.padding.to(torch.int64)
    elif seen.padding is None:
        kind = seen.documents
    else:
        kind = seen.documents.masked_fill(~seen.padding, -1)
    rows, n = kind.shape
    starts = torch.ones_like(kind, dtype=torch.bool)
    starts[:, 1:] = kind[:, 1:] != kind[:, :-1]
    k_starts = starts.flatten().nonzero().flatten()
    k_ends = torch.cat((k_starts, k_starts.new_full((1,), rows * n)))
    # Queries are the last n_queries positions of each row: counted up to each sequence's begin.
    first = n - seen.n_queries
    row, column = k_ends // n, k_ends % n
    q_ends = row * seen.n_queries + (column - first).clamp(min=0)
    ordered = kind.sort(dim=1).values
    numbers = rows + (ordered[:, 1:] != ordered[:, :-1]).sum()
    # The only wait for the device: three numbers at once.
    n_numbers, longest_q, longest_k = torch.stack((numbers, q_ends.diff().max(), k_ends.diff().max())).tolist()
    if n_numbers != len(k_starts):
        raise UserError(
            "attn_config.attn_impl: flash takes documents (and the real tokens of a padded row) in one piece each, and "
            "here one lies in several; set attn_impl to flex or sdpa"
        )
    return Sequences(q_ends.to(torch.int32), k_ends.to(torch.int32), _ceiling(longest_q, n), _ceiling(longest_k, n))


def _ceiling(x: int, most: int) -> int:
    """The next power of two, or `most`."""
    return int(min(1 << (x - 1).bit_length(), most)) if x > 0 else 1


def head_groups(needed: list[float], kv_heads: int, longest: int, window: int = -1) -> list[tuple[int, list[int]]]:
    """Key-value heads by window: pairs of a window (-1: all keys) and the heads that make do with it.

    Args:
        needed: the largest distance for each query head; query heads of one key-value head stay together.
        kv_heads: number of key-value heads.
        longest: the longest sequence of keys.
        window: a sliding window around everything, or -1.

    Windows are powers of two, and at most MAX_GROUPS: the narrowest join the next, which costs the least.
    """
    per = len(needed) // kv_heads
    most = longest if window < 0 else min(longest, window)
    windows = []
    for head in range(kv_heads):
        widest = max(needed[head * per : (head + 1) * per])
        windows.append(min(most, 1 << max(0, int(widest)).bit_length()) if widest < most else most)
    distinct = sorted(set(windows))
    merged = dict(zip(distinct, distinct, strict=True))
    for narrow in distinct[: max(0, len(distinct) - MAX_GROUPS)]:
        merged[narrow] = distinct[len(distinct) - MAX_GROUPS]
    groups: dict[int, list[int]] = {}
    for head, width in enumerate(windows):
        wide = merged[width]
        groups.setdefault(wide if wide < most else window, []).append(head)
    return list(groups.items())


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    /,
    *,
    softmax_scale: float,
    dropout_p: float,
    softcap: float | None,
) -> Tensor:
    _check(q, k, v, mask, dropout_p, softcap)
    how = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": True, "softcap": softcap or 0.0}
    # Its backward pass adds to the queries' gradients in the order in which blocks come, unless told otherwise.
    how["deterministic"] = torch.are_deterministic_algorithms_enabled()
    rows = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (batch, T, heads, head_dim)
    kv_heads = k.shape[1]
    groups = [(mask.window, list(range(kv_heads)))]
    # Inside torch.compile the windows, which are numbers, cannot be had from tensors without breaking the graph.
    if not mask.far_keys and mask.slopes is not None and not torch.compiler.is_compiling():
        needed = needed_windows(measure(q, k, softmax_scale, softcap=softcap), mask.slopes, mask.n_keys, softcap)
        longest = mask.n_keys if mask.sequences is None else mask.sequences.longest_k
        groups = head_groups(needed.nan_to_num(nan=math.inf).tolist(), kv_heads, longest, mask.window)
    if len(groups) == 1:
        return _call(mask, *rows, mask.slopes, groups[0][0], how).transpose(1, 2)

    per = q.shape[1] // kv_heads
    order = [head for _, heads in groups for head in heads]
    sizes = [len(heads) for _, heads in groups]
    parts = [_split(x, order, sizes, kv_heads) for x in (*rows, mask.slopes)]
    outs = [
        _call(mask, q_i, k_i, v_i, slopes_i, width, how)
        for q_i, k_i, v_i, slopes_i, (width, _) in zip(*parts, groups, strict=True)
    ]
    out = torch.cat(outs, dim=2)
    if order != list(range(kv_heads)):
        back = torch.tensor(order, device=q.device).argsort()
        out = out.unflatten(2, (kv_heads, per)).index_select(2, back).flatten(2, 3)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def _split(x: Tensor | None, order: list[int], sizes: list[int], kv_heads: int) -> tuple[Tensor, ...]:
    """The heads of each group: (batch, T, heads, head_dim), or slopes (heads,), in groups of key-value heads.

    One split instead of a slice for each group: the gradient of a slice is as large as all of x.
    """
    assert x is not None
    dim = 2 if x.dim() == 4 else 0
    per = x.shape[dim] // kv_heads
    if order != list(range(kv_heads)):
        heads = torch.tensor(order, device=x.device)[:, None] * per + torch.arange(per, device=x.device)
        x = x.index_select(dim, heads.flatten())
    return torch.split(x, [per * size for size in sizes], dim)


def _call(
    mask: FlashMask, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, window: int, how: dict[str, Any]
) -> Tensor:
    """One call of flash-attn; (batch, T, heads, head_dim) in and out."""
    where = mask.sequences
    window_size = (window, 0) if window >= 0 else (-1, -1)
    if where is None:
        return mask.whole(q, k, v, window_size=window_size, alibi_slopes=slopes, **how)
    out = mask.varlen(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=where.q_ends,
        cu_seqlens_k=where.k_ends,
        max_seqlen_q=where.longest_q,
        max_seqlen_k=where.longest_k,
        window_size=window_size,
        alibi_slopes=slopes,
        **how,
    )
    return out.view(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: FlashMask, dropout_p: float, softcap: float | None) -> None:
    """Raise UserError for what flash-attn cannot do."""
    if q.dtype not in LOW_PRECISION or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UserError("attn_config.attn_impl: flash computes in bfloat16 or float16 only; set attn_impl to auto")
    if q.shape[-1] > LARGEST_HEAD:
        raise UserError(
            f"attn_config.attn_impl: flash takes a head_dim of at most {LARGEST_HEAD}; d_model / n_heads is "
            f"{q.shape[-1]}. Set attn_impl to sdpa, or to flex"
        )
    if dropout_p and softcap is not None:
        raise UserError(
            "attn_config.attn_impl: flash has no dropout (attn_pdrop) together with soft-capping "
            "(attn_logit_softcapping); set attn_impl to auto"
        )
    if torch.compiler.is_compiling() and not mask.compilable:
        raise UserError(
            "compile_config: this flash-attn cannot be compiled; install 2.7 or newer with "
            f"`{INSTALL} --upgrade`, or remove compile_config"
        )


FLASH = Kernel("flash", FlashMask, _attend)
