"""A pre-norm transformer block."""

from typing import Any

from torch import Tensor, nn

from llmtrain.model.attention import SelfAttention
from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.ffn import build_ffn
from llmtrain.model.kernels.interface import Attention
from llmtrain.model.norm import build_norm


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)): the unit of sharding and of activation checkpointing."""

    def __init__(self, config: MPTConfig, layer: int, device: Any = None) -> None:
        super().__init__()
        norm = {"eps": config.norm_eps, "bias": not config.no_bias, "device": device}
        self.norm_1 = build_norm(config.norm_type, config.d_model, **norm)
        self.attn = SelfAttention(config, layer, device)
        self.norm_2 = build_norm(config.norm_type, config.d_model, **norm)
        self.ffn = build_ffn(config, device)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, attend: Attention, cache: KVCache | None = None) -> Tensor:
        """(batch, T, d_model) -> (batch, T, d_model)."""
        x = x + self.dropout(self.attn(self.norm_1(x), attend, cache))
        return x + self.dropout(self.ffn(self.norm_2(x)))  # type: ignore[no-any-return]
