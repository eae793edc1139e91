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
    """ALiBi slopes, one a head: slope * (j - i) is added to the scores."""
    padding: Tensor | None = None
    """(batch, n_keys) bool, True for real tokens: nobody sees padding, except that a padded query sees itself, so that
    no row is empty and everything stays finite."""
    documents: Tensor | None = None
    """(batch, n_keys) integers: a query sees only keys with its own number."""


class Attend(Protocol):
    """Attention proper.

    q is (batch, heads, n_queries, head_dim), k and v are (batch, heads, n_keys, head_dim); the result has the shape
    and dtype of q. `prepared` is what the same kernel's `prepare` returned; `dropout_p` is on the attention weights.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, prepared: Any, /, *, softmax_scale: float, dropout_p: float
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
    """A kernel with what it prepared for this forward: what the blocks receive.

    Deliberately a plain class, no tuple, dict or dataclass: FSDP2's mixed precision looks into those among a block's
    arguments, casts every float tensor it finds, and would round the ALiBi bias to bfloat16.
    """

    def __init__(self, kernel: Kernel, prepared: Any) -> None:
        self.kernel = kernel
        self.prepared = prepared

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, dropout_p: float) -> Tensor:
        """Attention of q over k and v; shapes as in `Attend`."""
        return self.kernel.attend(q, k, v, self.prepared, softmax_scale=softmax_scale, dropout_p=dropout_p)
