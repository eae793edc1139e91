"""Weights whose tensors are rows of others', or several put together: what a fused ``Wqkv`` needs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import Weights

Rows = tuple[str, int, int]
"""Name of a tensor, its first row, and the row behind its last."""


class RowsOf(Weights):
    """Tensors that are rows of others. The last one read is kept, so that q, k and v read their ``Wqkv`` once.

    Args:
        inner: What is read.
        parts: New name -> rows of a tensor of `inner`.
    """

    def __init__(self, inner: Weights, parts: Mapping[str, Rows]):
        self._inner = inner
        self._parts = dict(parts)
        self._kept: tuple[str, Tensor] | None = None
        super().__init__(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        whole, first, end = self._parts[name]
        if first == 0 and end == self._inner.shape(whole)[0]:
            return self._inner[whole]
        if self._kept is None or self._kept[0] != whole:
            self._kept = None  # never two at once
            self._kept = (whole, self._inner[whole])
        part = self._kept[1][first:end].clone()
        if end == self._kept[1].shape[0]:
            self._kept = None
        return part

    def shape(self, name: str) -> torch.Size:
        """Of one tensor."""
        whole, first, end = self._parts[name]
        return torch.Size((end - first, *self._inner.shape(whole)[1:]))

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._inner.dtype(self._parts[name][0])


class Stacked(Weights):
    """Tensors put together along their rows.

    Args:
        inner: What is read.
        parts: New name -> names in `inner`, in order.
    """

    def __init__(self, inner: Weights, parts: Mapping[str, tuple[str, ...]]):
        self._inner = inner
        self._parts = dict(parts)
        super().__init__(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        return self._inner[parts[0]] if len(parts) == 1 else torch.cat([self._inner[part] for part in parts])

    def shape(self, name: str) -> torch.Size:
        """Of one tensor."""
        shapes = [self._inner.shape(part) for part in self._parts[name]]
        return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor."""
        return self._inner.dtype(self._parts[name][0])
