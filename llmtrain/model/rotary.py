"""Rotary positions: pairs of numbers in queries and keys are turned by angles that grow with the position.

(Su et al. 2021, arXiv:2104.09864.) So q.k depends on how far apart the two are. Pair i of a head is (x[i], x[i + h])
with h = head_dim / 2, and turns by position * theta^(-i / h) = position * frequency[i].
"""

import math

import torch
from torch import Tensor

from llmtrain.model.config import MPTConfig, RopeHFConfig


class Rotation:
    """Cosines and sines of each token's angles, computed once in a forward for all layers.

    Deliberately a plain class, as `Attention` is: FSDP2's mixed precision would round tensors in a tuple to bfloat16.

    Attributes:
        cos: (batch or 1, 1, T, head_dim / 2), float32 (float64 for a float64 model).
        sin: the same.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def __call__(self, x: Tensor) -> Tensor:
        """Turn x, (batch, heads, T, head_dim) queries or keys; computed in the tables' dtype, returned in x's."""
        first, second = x.to(self.cos.dtype).chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)

    def part(self, tokens: slice) -> "Rotation":
        """The tables of some of the tokens."""
        return Rotation(self.cos[:, :, tokens], self.sin[:, :, tokens])


def rotation(config: MPTConfig, positions: Tensor, dtype: torch.dtype, coming: int = 0) -> Rotation:
    """The tables for positions (T,) or (batch, T); `dtype` is that of q and k.

    `dynamic` scaling goes by the length of each row: as far as the positions say, and `coming` more. Keys in a cache
    keep the angles that they had when they were computed, as in transformers.

    Angles are computed in float64: at position 70,000 float32 has steps of 0.008, and each pair's angle would be off by
    half of that.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64  # there is no float64 on mps
    at = positions.to(wide)[..., None]
    if at.dim() == 2:
        at = at[None]  # (1, T, 1)
    angles = at * frequencies(config, at, coming)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Rotation(angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None])


def frequencies(config: MPTConfig, positions: Tensor, coming: int) -> Tensor:
    """Radians by which each pair turns from one position to the next, (..., head_dim / 2), in positions' dtype.

    Args:
        config: rope_theta and scaling.
        positions: (batch or 1, T, 1); only `dynamic` scaling reads them, as it does
        coming: tokens that follow.
    """
    attn = config.attn_config
    scaling = (attn.rope_hf_config if attn.rope_impl == "hf" else None) or RopeHFConfig()
    width = config.d_head
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=positions.dtype) / width
    if scaling.type == "dynamic":
        # theta grows with the row's length, so that the slowest pair turns no further than it did at max_seq_len.
        length = positions.amax(dim=1, keepdim=True) + 1 + coming
        length = length.clamp(min=config.max_seq_len) / config.max_seq_len
        stretch = (scaling.factor * length - (scaling.factor - 1)) ** (width / (width - 2))
        return (attn.rope_theta * stretch) ** -exponents
    turns = attn.rope_theta**-exponents
    if scaling.type == "linear":
        return turns / scaling.factor
    if scaling.type == "llama3":
        return _llama3(turns, scaling)
    return turns


def _llama3(turns: Tensor, scaling: RopeHFConfig) -> Tensor:
    """Frequencies with a wavelength of the old context or more are divided, short ones stay, between is a ramp.

    (Llama 3.1: Grattafiori et al. 2024, arXiv:2407.21783; transformers' `llama3`.)
    """
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None
    assert high is not None
    assert context is not None
    in_context = context * turns / (2 * math.pi)  # how often a pair turns around within the old context
    kept = ((in_context - low) / (high - low)).clamp(0, 1)
    return turns * (kept + (1 - kept) / scaling.factor)
