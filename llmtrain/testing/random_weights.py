"""Weights of any size that take no memory: each tensor is made when it is asked for, the same each time."""

import zlib

import torch
from torch import Tensor

from llmtrain.checkpoint.names import expected_shapes
from llmtrain.checkpoint.weights import Weights
from llmtrain.model.config import MPTConfig


class RandomWeights(Weights):
    """All parameters of a model, normal around 0; around 1 for the scales of norms.

    Args:
        config: Of the model.
        dtype: Of all tensors.
        std: Of the values.
    """

    def __init__(self, config: MPTConfig, dtype: torch.dtype, std: float = 0.02):
        self._shapes = expected_shapes(config)
        self._dtype, self._std = dtype, std
        super().__init__(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = torch.empty(self._shapes[name], dtype=self._dtype).normal_(0, self._std, generator=generator)
        return value.add_(1) if "norm" in name and name.endswith("weight") else value

    def shape(self, name: str) -> torch.Size:
        """Of one tensor; makes nothing."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of every tensor."""
        return self._dtype
