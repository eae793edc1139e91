"""Multi-head causal self-attention with a fused projection."""

from typing import Any

from torch import Tensor, nn

from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.kernels.interface import Attention
from llmtrain.model.linear import FusedLinear, ResidualLinear
from llmtrain.model.norm import build_norm


class SelfAttention(nn.Module):
    """x (batch, T, d_model) -> (batch, T, d_model). Rows of `Wqkv` are [q; k; v], each ordered by head."""

    def __init__(self, config: MPTConfig, layer: int, device: Any = None) -> None:
        super().__init__()
        attn, d, bias = config.attn_config, config.d_model, not config.no_bias
        self.layer = layer
        self.n_heads = config.n_heads
        self.head_dim = d // config.n_heads
        self.clip_qkv = attn.clip_qkv
        self.softmax_scale = attn.softmax_scale or self.head_dim**-0.5
        self.dropout = attn.attn_pdrop
        self.Wqkv = FusedLinear(d, 3 * d, slices=3 * config.n_heads, bias=config.qkv_bias, device=device)
        self.q_ln = self.k_ln = None
        if attn.qk_ln:
            self.q_ln, self.k_ln = (
                build_norm(config.norm_type, d, eps=config.norm_eps, bias=bias, device=device) for _ in range(2)
            )
        self.out_proj = ResidualLinear(d, d, bias=bias, device=device)

    def forward(self, x: Tensor, attend: Attention, cache: KVCache | None = None) -> Tensor:
        """Attention over x, and over what the cache holds before it."""
        qkv = self.Wqkv(x)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        if self.q_ln is not None and self.k_ln is not None:
            q, k = self.q_ln(q).to(v.dtype), self.k_ln(k).to(v.dtype)
        q, k, v = (t.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        out = attend(q, k, v, softmax_scale=self.softmax_scale, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
