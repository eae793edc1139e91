"""Weights whose embeddings have more rows than were saved."""

from collections.abc import Collection

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import Renamed, Weights


class Grown(Renamed):
    """Other weights, some of them with more rows: the mean of those that are there.

    Args:
        inner: What is read.
        tables: Names of the tensors that grow, where they are there.
        rows: To have.
    """

    def __init__(self, inner: Weights, tables: Collection[str], rows: int):
        super().__init__(inner, {name: name for name in inner})
        self._tables, self._rows = set(tables), rows

    def __getitem__(self, name: str) -> Tensor:
        old = super().__getitem__(name)
        if name not in self._tables:
            return old
        grown = torch.empty(self.shape(name), dtype=old.dtype)
        grown[: len(old)] = old
        wide = torch.float64 if old.dtype == torch.float64 else torch.float32
        grown[len(old) :] = old.mean(dim=0, keepdim=True, dtype=wide).to(old.dtype)
        return grown

    def shape(self, name: str) -> torch.Size:
        """Of one tensor, grown or not; reads nothing."""
        shape = super().shape(name)
        return torch.Size([self._rows, *shape[1:]]) if name in self._tables else shape
