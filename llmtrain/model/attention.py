"""Causal self-attention: as many heads of keys and values as of queries, fewer (grouped), or one."""

from typing import Any

import torch
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
        self.d_head = config.d_head
        self.rows = config.qkv_rows
        self.clip_qkv = attn.clip_qkv
        self.softmax_scale = config.softmax_scale
        self.softcap = attn.attn_logit_softcapping
        self.dropout = attn.attn_pdrop
        self.fused = attn.fused_qkv

        def projection(rows: int) -> FusedLinear:
            return FusedLinear(d, rows, slices=rows // self.d_head, bias=config.qkv_bias, device=device)

        if self.fused:
            self.Wqkv = projection(sum(self.rows))
        else:
            self.Wq, self.Wk, self.Wv = map(projection, self.rows)
        self.q_ln = self.k_ln = None
        if attn.qk_ln or attn.qk_gn:
            widths = self.rows[:2] if attn.qk_ln else (self.d_head, self.d_head)
            self.q_ln, self.k_ln = (
                build_norm(config.norm_type, width, eps=config.norm_eps, bias=bias, device=device) for width in widths
            )
        self.norm_is_by_head = attn.qk_gn
        self.out_proj = ResidualLinear(self.rows[0], d, bias=bias, device=device)

    def forward(self, x: Tensor, attend: Attention, cache: KVCache | None = None) -> Tensor:
        """Attention over x, and over what the cache holds before it."""
        q, k, v = self.project(x)
        if attend.rotation is not None:
            q, k = attend.rotation(q), attend.rotation(k)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        out = attend(
            q,
            k,
            v,
            softmax_scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            softcap=self.softcap,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, T, d_head), keys and values (batch, kv_heads, T, d_head), clipped and normalised."""
        qkv = self.Wqkv(x) if self.fused else torch.cat([self.Wq(x), self.Wk(x), self.Wv(x)], dim=-1)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = qkv.split(self.rows, dim=-1)
        if not self.norm_is_by_head:
            q, k = self._normed(q, k)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)) for t in (q, k, v))
        if self.norm_is_by_head:
            q, k = self._normed(q, k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_ln is None or self.k_ln is None:
            return q, k
        return self.q_ln(q).to(q.dtype), self.k_ln(k).to(k.dtype)
