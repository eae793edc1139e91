"""The configuration of self-attention: llm-foundry's key names, meanings and defaults, without torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config, mistake

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
AttentionType = Literal["multihead_attention", "grouped_query_attention", "multiquery_attention"]
AttentionImpl = Literal["auto", "eager", "sdpa", "torch", "triton", "flash", "flex", "blockwise"]


def only(value: Any, *plain: Any) -> Any:
    """`value` if it is one of the `plain` values (True is not 1), else an error (pydantic adds the key)."""
    if any(value == p and isinstance(value, bool) == isinstance(p, bool) for p in plain):
        return value
    accepted = " or ".join("null" if p is None else str(p).lower() if isinstance(p, bool) else repr(p) for p in plain)
    raise ValueError(f"{value!r} is not supported; remove the key or set it to {accepted}")


class RopeDailConfig(Config):
    """Rotary positions with `rope_impl: dail` (`model.attn_config.rope_dail_config`)."""

    type: Literal["original", "xpos"] = "original"
    """Only `original` (Su et al. 2021, arXiv:2104.09864)."""
    pos_idx_in_fp32: bool = True
    """Only true: positions are never rounded."""
    xpos_scale_base: float = 512
    """Means nothing with `type: original`."""


class RopeHFConfig(Config):
    """Rotary positions with `rope_impl: hf` (`model.attn_config.rope_hf_config`): how they are scaled."""

    type: Literal["no_scaling", "linear", "dynamic", "llama3"] = "no_scaling"
    """`linear` divides positions by `factor`; `dynamic` raises `rope_theta` for rows longer than the model's
    `max_seq_len` (NTK); `llama3` divides the slow frequencies by `factor` and leaves the fast ones."""
    factor: Annotated[float, Field(ge=1.0)] = 1.0
    """How many times longer the text is than what the model was trained on before."""
    low_freq_factor: PositiveFloat | None = None
    """Of `llama3`: wavelengths above original_max_position_embeddings / this are scaled in full."""
    high_freq_factor: PositiveFloat | None = None
    """Of `llama3`: wavelengths below original_max_position_embeddings / this are not scaled."""
    original_max_position_embeddings: PositiveInt | None = None
    """Of `llama3`: tokens that the model was trained on before."""

    @model_validator(mode="after")
    def _factors_belong_to_the_type(self) -> Self:
        of_llama3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for key in of_llama3:
            given = getattr(self, key) is not None
            if given != (self.type == "llama3"):
                what = "means nothing with" if given else "is required with"
                raise mistake(f"{key} {what} type: {self.type}", key)
        if self.type == "no_scaling" and self.factor != 1.0:
            raise mistake(f"factor: {self.factor:g} means nothing with type: no_scaling; set type: linear", "factor")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise mistake("low_freq_factor must be below high_freq_factor", "low_freq_factor")
        return self


class AttentionConfig(Config):
    """Self-attention (`model.attn_config`)."""

    attn_type: AttentionType = "multihead_attention"
    """`grouped_query_attention` has `kv_n_heads` heads of keys and values (Ainslie et al. 2023, arXiv:2305.13245),
    `multiquery_attention` has one (Shazeer 2019, arXiv:1911.02150)."""
    kv_n_heads: PositiveInt | None = None
    """Heads of keys and values, with `attn_type: grouped_query_attention`; must divide n_heads."""
    attn_pdrop: Probability = 0.0
    """Dropout probability on the attention weights, while training."""
    attn_impl: AttentionImpl = "auto"
    """Kernel: `eager` (the reference), `sdpa` (torch's fused kernels), `blockwise` (memory of O(T) on any device, the
    fastest on CPUs), `flex` (torch's FlexAttention, GPUs), `flash` (the flash-attn package, GPUs), or `auto`, which
    chooses by device, length, dtype and mask, and says why. Old recipes' `torch` and `triton` mean `sdpa` here."""
    qk_ln: bool = False
    """Normalise queries and keys over all their heads together, each with the model's norm type (MPT-1B does)."""
    qk_gn: bool = False
    """Normalise queries and keys head by head, with one weight for all heads, each with the model's norm type."""
    clip_qkv: PositiveFloat | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv], before the norms (StoryWriter uses 6)."""
    softmax_scale: PositiveFloat | None = None
    """Factor on q.k before the softmax; null means 1/sqrt(head_dim)."""
    attn_logit_softcapping: PositiveFloat | None = None
    """Scores s become cap * tanh(s / cap), before ALiBi is added (Gemma 2, arXiv:2408.00118)."""
    sliding_window_size: int = -1
    """A token sees itself and so many tokens before it (Mistral counts the token itself: its 4096 is 4095 here); -1
    sees all."""

    alibi: bool = False
    """Attention with linear biases (Press et al. 2022, arXiv:2108.12409); switches learned positions off."""
    alibi_bias_max: PositiveFloat = 8.0
    """Head i of n = 2^ceil(log2 n_heads) has slope 2^(-alibi_bias_max * i / n). Released MPT-7B: 8; StoryWriter: 16."""
    alibi_window: Literal["exact", "off"] = "exact"
    """`exact`: keys that ALiBi puts so far away that all of them together weigh less than 2^-25 of a softmax sum are
    skipped, which float32 cannot tell from computing them. `off`: everything is computed."""
    rope: bool = False
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): each head's first half is rotated against its second.
    Switches learned positions off; not together with `alibi`."""
    rope_theta: PositiveFloat = 10000
    """Pair i of a head turns by position * rope_theta^(-2 i / head_dim)."""
    rope_impl: Literal["dail", "hf"] = "dail"
    """Two names for one function: `dail` reads `rope_dail_config`, `hf` reads `rope_hf_config`."""
    rope_dail_config: RopeDailConfig | None = None
    """With `rope_impl: dail`; null is its defaults."""
    rope_hf_config: RopeHFConfig | None = None
    """With `rope_impl: hf`; null is its defaults."""
    nope: bool = False
    """Written by llm-foundry. Only false."""

    flex_backend: Literal["triton", "flash"] = "triton"
    """Of `flex`: whose kernels run. `flash` is FlashAttention 4 (Hopper or newer, torch 2.11 or newer, package
    `flash-attn-4`), which torch calls experimental."""
    attn_uses_sequence_id: bool = False
    """Attend within documents only, as the batch's `sequence_id` tells them apart: what packed examples need. A row
    then is the same function as its documents one by one."""
    fused_qkv: bool = True
    """One `Wqkv` projection for queries, keys and values; false has `Wq`, `Wk` and `Wv`, the same function."""
    kv_dim: int | None = None
    """Width of what keys and values are computed from. Only null: there is no cross-attention."""
    prefix_lm: bool = False
    """Written in released MPT configs. Only false."""
    attn_temperature_tuning: dict[str, Any] | None = None
    """Not supported: null, or an `attn_scale` of 0, which is off."""

    @field_validator("kv_dim", "prefix_lm", "nope")
    @classmethod
    def _not_supported(cls, value: Any, info: Any) -> Any:
        return only(value, cls.model_fields[info.field_name].default)

    @field_validator("attn_temperature_tuning")
    @classmethod
    def _temperature_is_off(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None or not value.get("attn_scale"):
            return None
        raise ValueError(f"attn_scale: {value['attn_scale']} is not supported; remove the key or set attn_scale to 0")

    @field_validator("sliding_window_size")
    @classmethod
    def _window_sees_something(cls, value: int) -> int:
        if value == -1 or value > 0:
            return value
        raise ValueError(f"{value} must be the number of tokens before it that a token sees, or -1 for all")

    @model_validator(mode="after")
    def _norms_and_heads_fit(self) -> Self:
        if self.qk_ln and self.qk_gn:
            raise mistake("qk_ln and qk_gn are two ways to the same end; set one of them to false", "qk_gn")
        if self.attn_type == "grouped_query_attention" and self.kv_n_heads is None:
            raise mistake("attn_type: grouped_query_attention needs kv_n_heads", "attn_type")
        if self.attn_type == "multiquery_attention" and self.kv_n_heads not in (None, 1):
            raise mistake(
                f"kv_n_heads: {self.kv_n_heads} with attn_type: multiquery_attention, which has one; remove the "
                "key, or set attn_type: grouped_query_attention",
                "kv_n_heads",
            )
        return self

    @model_validator(mode="after")
    def _rope_is_whole(self) -> Self:
        if not self.rope:
            return self
        dail, hf = self.rope_dail_config or RopeDailConfig(), self.rope_hf_config or RopeHFConfig()
        if self.alibi:
            raise mistake("rope and alibi are both positions; set one of them to false", "rope")
        if dail.type == "xpos":
            raise mistake("rope_dail_config.type: xpos is not supported; set it to original", "rope_dail_config.type")
        if not dail.pos_idx_in_fp32:
            raise mistake(
                "rope_dail_config.pos_idx_in_fp32: false is not supported: positions are never rounded; set it to true",
                "rope_dail_config.pos_idx_in_fp32",
            )
        if hf.type != "no_scaling" and self.rope_impl != "hf":
            raise mistake(
                f"rope_hf_config.type: {hf.type} is read with rope_impl: hf only; set that", "rope_hf_config.type"
            )
        return self
