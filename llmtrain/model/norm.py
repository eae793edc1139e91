"""The four norms of MPT, by name."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region around, or None outside of one."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight [+ bias] over the last dimension (Ba et al. 2016)."""


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm that reads and writes autocast's dtype: half the memory traffic of the full-precision one."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        dtype = _autocast_dtype(x)
        if dtype is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019), in float32 at least."""

    def __init__(self, width: int, eps: float, device: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class LowPrecisionRMSNorm(RMSNorm):
    """RMSNorm that reads and writes autocast's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        dtype = _autocast_dtype(x)
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


def build_norm(norm_type: str, width: int, *, eps: float, bias: bool, device: Any = None) -> nn.Module:
    """The norm of that name over `width` numbers; RMS norms have no bias in any case."""
    match norm_type:
        case "layernorm":
            return LayerNorm(width, eps=eps, bias=bias, device=device)
        case "low_precision_layernorm":
            return LowPrecisionLayerNorm(width, eps=eps, bias=bias, device=device)
        case "rmsnorm":
            return RMSNorm(width, eps, device)
        case "low_precision_rmsnorm":
            return LowPrecisionRMSNorm(width, eps, device)
    raise ValueError(f"norm_type {norm_type!r} is unknown")
