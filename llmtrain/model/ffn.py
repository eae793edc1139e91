"""The feed-forward network of a block."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtrain.model.config import ActivationConfig, MPTConfig
from llmtrain.model.linear import ResidualLinear


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), an approximation of gelu (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


def activation(config: ActivationConfig) -> Callable[[Tensor], Tensor]:
    """The activation of that name."""
    if config.name == "gelu":
        return partial(F.gelu, approximate=config.approximate)
    others: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "quick_gelu": quick_gelu}
    return others[config.name]


class FeedForward(nn.Module):
    """down(act(up(x))), x (..., d_model) -> (..., d_model)."""

    def __init__(self, config: MPTConfig, device: Any = None) -> None:
        super().__init__()
        bias = not config.no_bias
        self.up_proj = nn.Linear(config.d_model, config.ffn_hidden_size, bias=bias, device=device)
        self.act = activation(config.ffn_config.ffn_act_fn)
        self.down_proj = ResidualLinear(config.ffn_hidden_size, config.d_model, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        return self.down_proj(self.act(self.up_proj(x)))  # type: ignore[no-any-return]


class GatedFeedForward(FeedForward):
    """down(act(gate(x)) * up(x)), x (..., d_model) -> (..., d_model) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: MPTConfig, device: Any = None) -> None:
        super().__init__(config, device)
        self.gate_proj = nn.Linear(config.d_model, config.ffn_hidden_size, bias=not config.no_bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def build_ffn(config: MPTConfig, device: Any = None) -> FeedForward:
    """The feed-forward network of `ffn_config.ffn_type`."""
    gated = config.ffn_config.ffn_type == "mptglu"
    return GatedFeedForward(config, device) if gated else FeedForward(config, device)
