"""The MPT configuration: llm-foundry's key names, meanings and defaults, without torch.

One default differs: `attn_impl` is `auto` (llm-foundry's `flash` cannot start without a GPU). Keys of features that
do not exist here are accepted where their value is the plain one, and refused by name otherwise.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config, mistake
from llmtrain.model.attention_config import (
    AttentionConfig,
    PositiveFloat,
    PositiveInt,
    Probability,
    RopeDailConfig,
    RopeHFConfig,
    only,
)
from llmtrain.model.checkpointing_target import Part, Target, parts_of

__all__ = [
    "ActivationConfig",
    "AttentionConfig",
    "FFNConfig",
    "InitConfig",
    "MPTConfig",
    "RopeDailConfig",
    "RopeHFConfig",
]


NormType = Literal["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"]


class ActivationConfig(Config):
    """The non-linearity between the two projections of the feed-forward network."""

    name: Literal["gelu", "relu", "silu", "quick_gelu"] = "gelu"
    """`quick_gelu` is x * sigmoid(1.702 x)."""
    approximate: Literal["none", "tanh"] = "none"
    """Of gelu only: `none` is the exact one (with erf)."""


class FFNConfig(Config):
    """Feed-forward network (`model.ffn_config`)."""

    ffn_type: Literal["mptmlp", "mptglu", "te_ln_mlp", "torch_dmoe", "mb_moe", "mb_dmoe"] = "mptmlp"
    """`mptmlp`: down(act(up(x))). `mptglu`: down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), three
    matrices instead of two. The others are not supported."""
    ffn_hidden_size: PositiveInt | None = None
    """Width between the projections; null means d_model * expansion_ratio."""
    ffn_act_fn: ActivationConfig = ActivationConfig()
    """Activation; llm-foundry's default is the exact gelu."""
    fc_type: str | dict[str, Any] = "torch"
    """Linear layer implementation. Only `torch`."""

    @field_validator("ffn_act_fn", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        return ActivationConfig() if value is None else value

    @field_validator("ffn_type")
    @classmethod
    def _not_supported_yet(cls, value: str) -> str:
        return str(only(value, "mptmlp", "mptglu"))

    @field_validator("fc_type")
    @classmethod
    def _torch_only(cls, value: Any) -> Any:
        return only(value, "torch", {"name": "torch"})


class InitConfig(Config):
    """Initialisation (`model.init_config`); the formulas are in `llmtrain.model.init`."""

    name: Literal[
        "default_",
        "baseline_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "neox_init_",
        "small_init_",
        "xavier_uniform_",
        "xavier_normal_",
    ] = "kaiming_normal_"
    """Scheme."""
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"
    """Of kaiming."""
    init_nonlinearity: Literal["linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"] = "relu"
    """Of kaiming: sets the gain (relu: sqrt 2)."""
    init_gain: float = 0.0
    """Of xavier: the gain, which must not be 0. Of kaiming: the negative slope of leaky_relu."""
    init_div_is_residual: bool | float = True
    """Divisor of the projections into the residual stream: true is sqrt(2 * n_layers), false is 1, else the number.
    `neox_init_` sets its own, `default_` uses none."""
    init_std: PositiveFloat | None = None
    """Of `baseline_`: standard deviation, required there."""
    emb_init_std: PositiveFloat | None = None
    """Embeddings: normal with this standard deviation instead of the scheme."""
    emb_init_uniform_lim: PositiveFloat | tuple[float, float] | None = None
    """Embeddings: uniform in [-lim, lim] or [low, high] instead of the scheme."""
    verbose: int = 0
    """Accepted for old recipes; means nothing."""

    @field_validator("init_div_is_residual")
    @classmethod
    def _divisor_is_positive(cls, value: bool | float) -> bool | float:
        if not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{value!r} must be true, false or a number above 0")
        return value

    @model_validator(mode="after")
    def _scheme_has_its_numbers(self) -> Self:
        if self.name == "baseline_" and self.init_std is None:
            raise ValueError("init_config.init_std is required with name: baseline_ (for example 0.02)")
        if self.name.startswith("xavier") and self.init_gain <= 0:
            raise ValueError(
                f"init_config.init_gain must be above 0 with name: {self.name} (0 makes all weights 0); use 1"
            )
        if self.emb_init_std is not None and self.emb_init_uniform_lim is not None:
            raise ValueError("init_config: give emb_init_std or emb_init_uniform_lim, not both")
        if (
            isinstance(self.emb_init_uniform_lim, tuple)
            and not self.emb_init_uniform_lim[0] < self.emb_init_uniform_lim[1]
        ):
            raise ValueError(f"init_config.emb_init_uniform_lim: {self.emb_init_uniform_lim} must be [low, high]")
        return self


class MPTConfig(Config):
    """An MPT language model (`model:` in a recipe with `name: mpt_causal_lm`)."""

    name: Literal["mpt_causal_lm"] = "mpt_causal_lm"
    """Which model this section describes."""
    pretrained: str | None = None
    """Start from these weights when the run has no checkpoint of its own: a run, a checkpoint, a `.pt` file, a Hugging
    Face MPT folder of either layout, a hub name, or a folder in an object store. Shapes that are left out are taken
    from there; the vocabulary may grow."""
    d_model: PositiveInt = 2048
    """Width of the residual stream."""
    n_heads: PositiveInt = 16
    """Attention heads; must divide d_model, unless `head_dim` is given."""
    n_layers: PositiveInt = 24
    """Number of blocks."""
    expansion_ratio: PositiveFloat = 4
    """Feed-forward width over d_model; their product must be an integer."""
    max_seq_len: PositiveInt = 2048
    """Tokens in a training sequence; also the number of learned positions."""
    vocab_size: PositiveInt = 50368
    """Rows of the embedding (tokenizer's vocabulary, padded; multiples of 128 are fastest on GPUs)."""
    resid_pdrop: Probability = 0.0
    """Dropout probability on what attention and feed-forward add to the residual stream."""
    emb_pdrop: Probability = 0.0
    """Dropout probability on the embeddings."""
    learned_pos_emb: bool = True
    """Learned absolute positions; ignored (off) when `attn_config.alibi` or `attn_config.rope` is on."""
    attn_config: AttentionConfig = AttentionConfig()
    """Attention."""
    ffn_config: FFNConfig = FFNConfig()
    """Feed-forward network."""
    init_config: InitConfig = InitConfig()
    """Initialisation."""
    init_device: Literal["cpu", "meta", "mixed"] = "cpu"
    """Where parameters are first made: `mixed` is cpu on local rank 0 and meta elsewhere. Read by the trainer."""
    logit_scale: float | Literal["inv_sqrt_d_model"] | None = None
    """Factor on the logits; `inv_sqrt_d_model` is 1/sqrt(d_model)."""
    no_bias: bool = False
    """Leave out every bias, those of the norms included (the released MPT-7B)."""
    attention_bias: bool | None = None
    """Bias of `Wqkv` only; null means not `no_bias`."""
    embedding_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor f on the gradient of the embeddings: x*f + x.detach()*(1-f) (GLM-130B, arXiv:2210.02414)."""
    norm_type: NormType = "low_precision_layernorm"
    """The low-precision norms compute in autocast's dtype; without autocast they equal the others."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in the norms."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the head; false adds `lm_head` (without bias)."""
    use_cache: bool = False
    """Accepted as in exported configs; generation always uses a cache, training never."""
    loss_fn: Literal["fused_crossentropy", "torch_crossentropy"] = "fused_crossentropy"
    """Accepted; both mean llmtrain's chunked cross-entropy."""

    head_dim: PositiveInt | None = None
    """Width of a head; null means d_model / n_heads."""
    use_pad_tok_in_ffn: bool = True
    """Only true."""
    fc_type: str | dict[str, Any] = "torch"
    """Linear layer implementation. Only `torch`."""
    final_logit_softcapping: PositiveFloat | None = None
    """Logits l become cap * tanh(l / cap), after `logit_scale` (Gemma 2, arXiv:2408.00118)."""
    block_overrides: dict[str, Any] | None = None
    """Not supported: null (all blocks are alike)."""
    activation_checkpointing_target: Target | None = None
    """What `fsdp_config.activation_checkpointing` recomputes; null is whole blocks, all of them. A name, a list of
    names, or `{name: blocks}`: names are `mptblock` and those of this model's attention, feed-forward network and norm
    (`grouped_query_attention`, `mptmlp`, `layernorm`, ...); blocks are a number n (the first n), a list of numbers,
    `first-n`, `middle-m`, `last-k`, `range-i-j` ([i, j)), or several of these with commas or as a list."""
    verbose: int = 0
    """Accepted for old recipes; means nothing."""

    @property
    def uses_learned_positions(self) -> bool:
        """Whether there is a `transformer.wpe`."""
        return self.learned_pos_emb and not (self.attn_config.alibi or self.attn_config.rope)

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; each serves n_heads / kv_heads query heads."""
        one = 1 if self.attn_config.attn_type == "multiquery_attention" else self.n_heads
        return self.attn_config.kv_n_heads or one

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of `Wqkv` that make queries, keys and values: heads * d_head of each."""
        return self.n_heads * self.d_head, self.kv_heads * self.d_head, self.kv_heads * self.d_head

    @property
    def softmax_scale(self) -> float:
        """The number that q.k is multiplied with."""
        return self.attn_config.softmax_scale or self.d_head**-0.5

    @property
    def ffn_hidden_size(self) -> int:
        """Width of the feed-forward network."""
        return self.ffn_config.ffn_hidden_size or int(self.d_model * self.expansion_ratio)

    @property
    def qkv_bias(self) -> bool:
        """Whether `Wqkv` has a bias."""
        return not self.no_bias if self.attention_bias is None else self.attention_bias

    @property
    def logit_factor(self) -> float | None:
        """The number that the logits are multiplied with, or None."""
        return self.d_model**-0.5 if self.logit_scale == "inv_sqrt_d_model" else self.logit_scale

    @field_validator("attn_config", "ffn_config", "init_config", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("use_pad_tok_in_ffn", "block_overrides")
    @classmethod
    def _not_supported(cls, value: Any, info: Any) -> Any:
        return only(value, cls.model_fields[info.field_name].default)

    @field_validator("fc_type")
    @classmethod
    def _torch_only(cls, value: Any) -> Any:
        return only(value, "torch", {"name": "torch"})

    def checkpointing_parts(self) -> dict[Part, frozenset[int]]:
        """What `activation_checkpointing_target` says: part of a block -> numbers of the blocks."""
        return parts_of(
            self.activation_checkpointing_target,
            self.n_layers,
            attn_type=self.attn_config.attn_type,
            ffn_type=self.ffn_config.ffn_type,
            norm_type=self.norm_type,
        )

    @model_validator(mode="after")
    def _target_is_there(self) -> Self:
        try:
            self.checkpointing_parts()
        except ValueError as problem:
            raise mistake(str(problem), "activation_checkpointing_target") from problem
        return self

    @field_validator("logit_scale")
    @classmethod
    def _logits_must_vary(cls, value: float | str | None) -> float | str | None:
        if value == 0:
            raise ValueError("0 makes all logits equal; remove it, or give a number or inv_sqrt_d_model")
        return value

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model: {self.d_model} must be a multiple of n_heads: {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise mistake(
                f"n_heads: {self.n_heads} must be a multiple of attn_config.kv_n_heads: {self.kv_heads}",
                "attn_config.kv_n_heads",
            )
        if self.attn_config.attn_type == "multihead_attention" and self.kv_heads != self.n_heads:
            raise mistake(
                f"attn_config.kv_n_heads: {self.kv_heads} with attn_type: multihead_attention, which has n_heads: "
                f"{self.n_heads} of them; set attn_type: grouped_query_attention",
                "attn_config.kv_n_heads",
            )
        if self.attn_config.rope and self.d_head % 2:
            raise mistake(f"attn_config.rope turns pairs, but heads have a width of {self.d_head}", "attn_config.rope")
        if self.ffn_config.ffn_hidden_size is None and self.d_model * self.expansion_ratio % 1:
            raise ValueError(
                f"expansion_ratio: {self.expansion_ratio} * d_model: {self.d_model} must be an integer; "
                "change it or set ffn_config.ffn_hidden_size"
            )
        return self
