"""Parameters and floating-point operations by formula, without torch."""

from llmtrain.model.config import MPTConfig


def n_params(config: MPTConfig) -> int:
    """Number of parameters; the tied head counts once."""
    d, ffn, bias = config.d_model, config.ffn_hidden_size, 0 if config.no_bias else 1
    norms = 1 + bias if config.norm_type.endswith("layernorm") else 1  # parameters for each number normalised
    q, k, v = config.qkv_rows
    attention = (q + k + v) * (d + config.qkv_bias) + d * (q + bias)
    attention += norms * ((q + k) * config.attn_config.qk_ln + 2 * config.d_head * config.attn_config.qk_gn)
    up_projections = 2 if config.ffn_config.ffn_type == "mptglu" else 1
    feed_forward = up_projections * ffn * (d + bias) + d * (ffn + bias)
    embeddings = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    positions = config.max_seq_len if config.uses_learned_positions else 0
    return d * (embeddings + positions + norms) + config.n_layers * (2 * norms * d + attention + feed_forward)


def n_active_params(config: MPTConfig) -> int:
    """Parameters that take part for each token: all of them, as the model is dense."""
    return n_params(config)


def forward_flops_per_token(config: MPTConfig, seq_len: int) -> float:
    """Floating-point operations of the matrix products for one token's logits, in a sequence of `seq_len` tokens.

    A multiply-add counts 2. Attention is counted as the full seq_len x seq_len square, causal or not: the convention
    behind published MFU figures of this family (PaLM, arXiv:2204.02311 appendix B; llm-foundry). Those count
    2 * n_params instead of the matrices alone, which is 0.01 % more for MPT-7B and 1 % for a 125M with positions. A
    sliding window is counted as what it lets a token see.
    """
    d, (q, k, v) = config.d_model, config.qkv_rows
    matrices = d * (2 * q + k + v) + (3 if config.ffn_config.ffn_type == "mptglu" else 2) * d * config.ffn_hidden_size
    window = config.attn_config.sliding_window_size
    n_keys = seq_len if window < 0 else min(seq_len, window + 1)
    return 2.0 * (config.n_layers * (matrices + 2 * n_keys * q) + config.vocab_size * d)


def flops_per_token(config: MPTConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: forward and, twice that, backward, without recomputation."""
    return 3.0 * forward_flops_per_token(config, seq_len)
