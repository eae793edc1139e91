"""Attention with linear biases: the slopes and the distances (Press et al. 2022, arXiv:2108.12409)."""

import torch
from torch import Tensor


def slopes(n_heads: int, bias_max: float = 8.0) -> list[float]:
    """One slope a head, in float64: with n = 2^ceil(log2 n_heads), head i of n has 2^(-bias_max * i / n), i = 1..n.

    When n_heads is no power of two, MPT takes every second of the n slopes (i = 2, 4, ...), then the others
    (i = 1, 3, ...), and keeps the first n_heads. All slopes are below 1.
    """
    n = 1 << (n_heads - 1).bit_length()
    powers: list[float] = [2.0 ** (-bias_max * i / n) for i in range(1, n + 1)]
    if n != n_heads:
        powers = powers[1::2] + powers[::2]
    return powers[:n_heads]


def distances(n_queries: int, n_keys: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The distances j - i, shape (n_queries, n_keys): the queries are the last n_queries of the n_keys positions.

    The form matters: released MPT code adds slope * (j - n_keys + 1), the same softmax in exact arithmetic, but there
    early rows add one large number to all their scores and lose their low bits. j - i is 0 where it counts.
    """
    positions = torch.arange(n_keys, device=device, dtype=dtype)
    return positions - positions[n_keys - n_queries :, None]
