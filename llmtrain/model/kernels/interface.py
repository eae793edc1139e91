"""The seam between the model and its attention kernels.

Once per forward the model describes who may see whom (`Visibility`); a kernel turns that into whatever it needs (a
dense bias, slopes, a block mask) in `prepare`, and every layer calls `attend` with the result. A new kernel is a new
`Kernel` and a line in `select.py`; the model does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.model.rotary import Rotation


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who attends to whom, and from how far. Attention is always causal: key j is seen by query i when j <= i.

    The queries are the last `n_queries` of the `n_keys` positions (with a KV cache there are fewer queries than keys).
    """

    n_queries: int
    n_keys: int
    device: torch.device
    dtype: torch.dtype
    """Dtype of q, k and v."""
    slopes: tuple[float, ...] | None = None
    """ALiBi slopes, one a (query) head: slope * (j - i) is added to the scores."""
    padding: Tensor | None = None
    """(batch, n_keys) bool, True for real tokens: nobody sees padding, except that a padded query sees itself, so that
    no row is empty and everything stays finite."""
    documents: Tensor | None = None
    """(batch, n_keys) integers: a query sees only keys with its own number."""
    window: int | None = None
    """Sliding window: a query sees only the keys with i - j <= window."""
    skip_far_keys: bool = True
    """Whether a kernel may leave out keys that ALiBi puts so far away that all of them together weigh less than float32
    resolves (`attn_config.alibi_window`)."""


class Attend(Protocol):
    """Attention proper.

    q is (batch, heads, n_queries, head_dim), k and v are (batch, kv_heads, n_keys, head_dim), where query head h reads
    key head h // (heads / kv_heads); the result has the shape and dtype of q. `prepared` is what the same kernel's
    `prepare` returned; `dropout_p` is on the attention weights; with a `softcap` c the scaled products s become
    c * tanh(s / c) before ALiBi is added (Gemma 2, arXiv:2408.00118).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: Any,
        /,
        *,
        softmax_scale: float,
        dropout_p: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of q over k and v."""
        ...


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention."""

    name: str
    prepare: Callable[[Visibility], Any]
    attend: Attend


class Attention:
    """A kernel with what it prepared for this forward, and the rotation of queries and keys: what the blocks receive.

    Deliberately a plain class, no tuple, dict or dataclass: FSDP2's mixed precision looks into those among a block's
    arguments, casts every float tensor it finds, and would round the ALiBi bias to bfloat16.
    """

    def __init__(self, kernel: Kernel, prepared: Any, rotation: Rotation | None = None) -> None:
        self.kernel = kernel
        self.prepared = prepared
        self.rotation = rotation

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        dropout_p: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Attention of q over k and v; shapes as in `Attend`."""
        return self.kernel.attend(
            q, k, v, self.prepared, softmax_scale=softmax_scale, dropout_p=dropout_p, softcap=softcap
        )


def repeat_kv(k: Tensor, n_heads: int) -> Tensor:
    """Key (or value) heads (batch, kv_heads, ...) repeated, so that each query head has its own: (batch, n_heads, ...).

    A view where nothing has to be repeated.
    """
    return k if k.shape[1] == n_heads else k.repeat_interleave(n_heads // k.shape[1], dim=1)
