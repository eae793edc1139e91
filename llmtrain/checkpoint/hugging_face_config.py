"""MPTConfig <-> the config.json of transformers' own ``MptForCausalLM``, and what that class cannot express.

transformers reads ``alibi: false``, ``alibi_bias_max``, ``qk_ln``, ``expansion_ratio``, ``logit_scale``, ``no_bias``,
``learned_pos_emb`` and ``norm_type`` and then ignores them (measured on 4.57 and 5.23), as it does keys that it does
not know (rotary positions, windows, heads of keys and values, ...): such a model would open without a warning and
compute another function. So it is refused here, key by key.
"""

from typing import Any

from pydantic import ValidationError

from llmtrain.errors import UserError
from llmtrain.model.config import AttentionConfig, MPTConfig

NATIVE = "MptForCausalLM"
"""transformers' own class; MosaicML's remote code called its class ``MPTForCausalLM``."""

# What transformers' MptConfig says where config.json is silent; it writes only what differs from its defaults.
_NATIVE_DEFAULTS: dict[str, Any] = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "resid_pdrop": 0.0,
    "emb_pdrop": 0.0,
    "learned_pos_emb": True,
    "logit_scale": None,
    "no_bias": True,
    "embedding_fraction": 1.0,
    "norm_type": "low_precision_layernorm",
    "tie_word_embeddings": True,
}
_NATIVE_ATTENTION: dict[str, Any] = {
    "attn_type": "multihead_attention",
    "attn_pdrop": 0.0,
    "clip_qkv": None,
    "softmax_scale": None,
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
}
# MosaicML's configs: the same keys; where they are silent, MPTConfig's defaults hold. The rest (names of files,
# versions, kernels, devices) says nothing about the function.
_MODEL_KEYS = {*_NATIVE_DEFAULTS, "attn_config", "ffn_config", "norm_eps", "attention_bias", "head_dim"}
_MODEL_KEYS |= {"final_logit_softcapping", "block_overrides", "fc_type", "use_pad_tok_in_ffn"}
_ATTENTION_IGNORED = {"attn_impl"}


def inexpressible(config: MPTConfig) -> list[str]:
    """Each key of a config that transformers' ``MptForCausalLM`` would ignore, with its value and why; [] if none."""
    attention = config.attn_config
    found = []
    if attention.rope:
        found.append("attn_config.rope: true (transformers' MPT always uses ALiBi)")
    elif not attention.alibi:
        positions = "learned positions" if config.uses_learned_positions else "no positions"
        found.append(f"attn_config.alibi: false ({positions}; transformers' MPT always uses ALiBi)")
    elif attention.alibi_bias_max != 8:
        found.append(f"attn_config.alibi_bias_max: {attention.alibi_bias_max:g} (transformers' MPT always uses 8)")
    for norm in ("qk_ln", "qk_gn"):
        if getattr(attention, norm):
            found.append(f"attn_config.{norm}: true (transformers' MPT has no such norms)")
    if config.kv_heads != config.n_heads:
        heads = f"attn_config.attn_type: {attention.attn_type}"
        found.append(f"{heads}, {config.kv_heads} heads of keys and values (transformers' MPT has as many as queries)")
    if config.n_heads * config.d_head != config.d_model:
        found.append(f"head_dim: {config.d_head} (transformers' MPT always uses d_model / n_heads)")
    if not attention.fused_qkv:
        found.append("attn_config.fused_qkv: false (transformers' MPT has one Wqkv)")
    if attention.sliding_window_size > 0:
        window = f"attn_config.sliding_window_size: {attention.sliding_window_size}"
        found.append(f"{window} (transformers' MPT always attends to all)")
    if attention.attn_logit_softcapping is not None:
        cap = f"attn_config.attn_logit_softcapping: {attention.attn_logit_softcapping:g}"
        found.append(f"{cap} (transformers' MPT caps nothing)")
    if config.final_logit_softcapping is not None:
        cap = f"final_logit_softcapping: {config.final_logit_softcapping:g}"
        found.append(f"{cap} (transformers' MPT caps nothing)")
    if config.ffn_config.ffn_type != "mptmlp":
        found.append(f"ffn_config.ffn_type: {config.ffn_config.ffn_type} (transformers' MPT has no gate)")
    if config.ffn_hidden_size != 4 * config.d_model:
        ratio = config.ffn_hidden_size / config.d_model
        found.append(f"expansion_ratio: {ratio:g} (transformers' MPT always uses 4)")
    activation = config.ffn_config.ffn_act_fn
    if (activation.name, activation.approximate) != ("gelu", "none"):
        found.append(f"ffn_config.ffn_act_fn: {activation.name} (transformers' MPT always uses the exact gelu)")
    if config.logit_factor not in (None, 1.0):
        found.append(f"logit_scale: {config.logit_scale} (transformers' MPT does not scale logits)")
    if not config.no_bias:
        found.append("no_bias: false (transformers' MPT has no biases)")
    elif config.qkv_bias:
        found.append("attention_bias: true (transformers' MPT has no biases)")
    if config.norm_type.endswith("rmsnorm"):
        found.append(f"norm_type: {config.norm_type} (transformers' MPT always uses layer norm)")
    return found


def to_hugging_face(config: MPTConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: Must be expressible (:func:`inexpressible` has nothing to say).
        dtype: Of the weights, such as ``float32``.
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` where they are known.
    """
    attention = config.attn_config
    return {
        "architectures": [NATIVE],
        "model_type": "mpt",
        "torch_dtype": dtype,  # transformers 4 and 5 both read this name
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "expansion_ratio": 4,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "resid_pdrop": config.resid_pdrop,
        "emb_pdrop": config.emb_pdrop,
        "layer_norm_epsilon": config.norm_eps,
        "learned_pos_emb": False,
        "logit_scale": None,
        "no_bias": True,
        "embedding_fraction": config.embedding_fraction,
        "norm_type": config.norm_type,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "attn_config": {
            "attn_type": "multihead_attention",
            "attn_impl": "torch",
            "attn_pdrop": 0,  # transformers 5 accepts only an int here; dropout changes training, not the function
            "clip_qkv": None if attention.clip_qkv is None else float(attention.clip_qkv),
            "softmax_scale": attention.softmax_scale,
            "prefix_lm": False,
            "qk_ln": False,
            "attn_uses_sequence_id": False,
            "alibi": True,
            "alibi_bias_max": 8,
        },
        **{name: value for name, value in token_ids.items() if value is not None},
    }


def from_hugging_face(data: dict[str, Any], where: str) -> MPTConfig:
    """Build our config from a config.json: MPT's, Llama's, Mistral's, or that of our own modelling file.

    MPT's is transformers' own or MosaicML's older one. In transformers' a key that it ignores must have the value that
    it acts as; in MosaicML's (class ``MPTForCausalLM``) every key means what it says.

    Raises:
        UserError: it is another model, or the config cannot be built, or says one thing and does another.
    """
    from llmtrain.checkpoint.layouts.reading import MODEL_TYPES, mpt_block

    architectures = data.get("architectures") or []
    if not isinstance(architectures, list) or not isinstance(data.get("attn_config") or {}, dict):
        raise UserError(f"{where}: expected a list in `architectures` and a mapping in `attn_config`.")
    if data.get("model_type") in MODEL_TYPES:
        return _validated(mpt_block(data, where), where)
    if data.get("model_type") != "mpt":
        raise UserError(
            f"{where}: model_type is {data.get('model_type')!r}; only `mpt`, `llama` and `mistral` can be read, and "
            "exports with llmtrain's modelling file."
        )
    mosaic = bool(architectures) and NATIVE not in architectures and "MPTForCausalLM" in architectures
    attention = {k: v for k, v in (data.get("attn_config") or {}).items() if k not in _ATTENTION_IGNORED}
    block = {key: value for key, value in data.items() if key in _MODEL_KEYS and key != "attn_config"}
    if not mosaic:
        # A sub-config of transformers carries keys of its base class, too.
        attention = _NATIVE_ATTENTION | {k: v for k, v in attention.items() if k in AttentionConfig.model_fields}
        block = _NATIVE_DEFAULTS | block
        block.pop("norm_eps", None)  # not a key of transformers'
    if "norm_eps" not in block and "layer_norm_epsilon" in data:
        block["norm_eps"] = data["layer_norm_epsilon"]
    config = _validated({**block, "attn_config": attention}, where)
    if not mosaic and (problems := inexpressible(config)):
        raise UserError(
            f"{where}: the config asks for what transformers' {NATIVE} ignores, so it is unclear which function is "
            f"meant: {'; '.join(problems)}. Correct config.json, or name MPTForCausalLM in `architectures` if the "
            "weights were trained that way."
        )
    return config


def _validated(block: dict[str, Any], where: str) -> MPTConfig:
    try:
        return MPTConfig.model_validate(block)
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{where}: {lines}") from None
