"""Parameters and floating-point operations by formula, without torch."""

from llmtrain.model.config import MPTConfig


def n_params(config: MPTConfig) -> int:
    """Number of parameters; the tied head counts once."""
    d, ffn = config.d_model, config.ffn_hidden_size
    bias = 0 if config.no_bias else 1
    norm = d * (1 + bias) if config.norm_type.endswith("layernorm") else d
    attention = 3 * d * (d + config.qkv_bias) + d * (d + bias) + 2 * norm * config.attn_config.qk_ln
    feed_forward = ffn * (d + bias) + d * (ffn + bias)
    embeddings = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    positions = config.max_seq_len if config.uses_learned_positions else 0
    return d * (embeddings + positions) + config.n_layers * (2 * norm + attention + feed_forward) + norm


def n_active_params(config: MPTConfig) -> int:
    """Parameters that take part for each token: all of them, as the model is dense."""
    return n_params(config)


def forward_flops_per_token(config: MPTConfig, seq_len: int) -> float:
    """Floating-point operations of the matrix products for one token's logits, in a sequence of `seq_len` tokens.

    A multiply-add counts 2. Attention is counted as the full seq_len x seq_len square, causal or not: the convention
    behind published MFU figures of this family (PaLM, arXiv:2204.02311 appendix B; llm-foundry). Those count
    2 * n_params instead of the matrices alone, which is 0.01 % more for MPT-7B and 1 % for a 125M with positions.
    """
    d = config.d_model
    matrices = 4 * d * d + 2 * d * config.ffn_hidden_size
    return 2.0 * (config.n_layers * (matrices + 2 * seq_len * d) + config.vocab_size * d)


def flops_per_token(config: MPTConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: forward and, twice that, backward, without recomputation."""
    return 3.0 * forward_flops_per_token(config, seq_len)
