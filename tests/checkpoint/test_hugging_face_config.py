"""Which configs transformers' own MPT can express, key by key; and configs that llm-foundry writes."""

from typing import Any

import pytest

from llmtrain.checkpoint.hugging_face_config import from_hugging_face, inexpressible
from llmtrain.errors import UserError
from llmtrain.model.config import AttentionConfig, FFNConfig, MPTConfig

GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 4}
REFUSED: dict[str, dict[str, Any]] = {
    "attn_config.alibi: false (learned positions": {"attn_config": {"alibi": False}},
    "attn_config.alibi: false (no positions": {"attn_config": {"alibi": False}, "learned_pos_emb": False},
    "attn_config.alibi_bias_max: 16": {"attn_config": {"alibi_bias_max": 16}},
    "attn_config.rope: true": {"attn_config": {"alibi": False, "rope": True}},
    "attn_config.qk_ln: true": {"attn_config": {"qk_ln": True}},
    "attn_config.qk_gn: true": {"attn_config": {"qk_gn": True}},
    "attn_config.attn_type: grouped_query_attention, 4 heads": {"attn_config": GROUPED},
    "attn_config.attn_type: multiquery_attention, 1 heads": {"attn_config": {"attn_type": "multiquery_attention"}},
    "attn_config.fused_qkv: false": {"attn_config": {"fused_qkv": False}},
    "attn_config.sliding_window_size: 512": {"attn_config": {"sliding_window_size": 512}},
    "attn_config.attn_logit_softcapping: 50": {"attn_config": {"attn_logit_softcapping": 50}},
    "final_logit_softcapping: 30": {"final_logit_softcapping": 30},
    "head_dim: 64": {"head_dim": 64},
    "ffn_config.ffn_type: mptglu": {"ffn_config": {"ffn_type": "mptglu"}},
}


def config(**options: Any) -> MPTConfig:
    return MPTConfig(**{"no_bias": True, **options, "attn_config": {"alibi": True, **options.get("attn_config", {})}})


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_key(message: str) -> None:
    (found,) = inexpressible(config(**REFUSED[message]))
    assert found.startswith(message)


@pytest.mark.parametrize("options", [{}, {"head_dim": 128}, {"attn_config": {**GROUPED, "kv_n_heads": 16}}], ids=str)
def test_expressible(options: dict[str, Any]) -> None:
    assert inexpressible(config(**options)) == []


def test_no_key_is_forgotten() -> None:
    """Each key is written, or refused (here or in test_export.py), or says nothing about the function."""
    written = {"d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size", "resid_pdrop", "emb_pdrop", "norm_eps"}
    written |= {"embedding_fraction", "tie_word_embeddings", "attn_pdrop", "clip_qkv", "softmax_scale"}
    refused = {key.split(":")[0].split(".")[-1] for key in REFUSED} | {"kv_n_heads", "learned_pos_emb"}
    refused |= {"logit_scale", "no_bias", "attention_bias", "norm_type", "expansion_ratio", "ffn_hidden_size"}
    refused |= {"ffn_act_fn", "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config"}
    of_training = {"name", "pretrained", "init_config", "init_device", "loss_fn", "use_cache", "verbose", "attn_impl"}
    of_training |= {"alibi_window", "flex_backend", "activation_checkpointing_target", "attn_uses_sequence_id"}
    one_value = {"use_pad_tok_in_ffn", "fc_type", "block_overrides", "nope", "kv_dim", "prefix_lm"}
    one_value |= {"attn_temperature_tuning", "attn_config", "ffn_config"}
    keys = {*MPTConfig.model_fields, *AttentionConfig.model_fields, *FFNConfig.model_fields}
    assert keys - written - refused - of_training - one_value == set()


FOUNDRY: dict[str, Any] = {
    "model_type": "mpt",
    "architectures": ["MPTForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "attn_config": {
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
        "attn_impl": "flash",
        "attn_logit_softcapping": 50.0,
        "attn_temperature_tuning": {"attn_scale": 0.0, "floor_scale": 8192},
        "fused_qkv": True,
        "kv_dim": None,
        "nope": False,
        "qk_gn": True,
        "rope": True,
        "rope_dail_config": {"pos_idx_in_fp32": True, "type": "original", "xpos_scale_base": 512},
        "rope_hf_config": {"factor": 4.0, "type": "linear"},
        "rope_impl": "hf",
        "rope_theta": 500000,
        "sliding_window_size": 1024,
    },
    "ffn_config": {"ffn_type": "mptglu", "fc_type": {"name": "torch"}, "ffn_act_fn": {"name": "silu"}},
    "fc_type": {"name": "torch"},
    "final_logit_softcapping": 30.0,
    "block_overrides": None,
    "d_model": 64,
    "n_heads": 8,
    "n_layers": 2,
    "no_bias": True,
    "vocab_size": 128,
    "use_pad_tok_in_ffn": True,
    "init_config": {"name": "kaiming_normal_"},
}


def test_llm_foundrys_config_with_wider_keys() -> None:
    found = from_hugging_face(FOUNDRY, "config.json")
    assert found.qkv_rows == (64, 16, 16)
    assert (found.ffn_config.ffn_type, found.final_logit_softcapping) == ("mptglu", 30)
    attention = found.attn_config
    assert (attention.qk_gn, attention.sliding_window_size, attention.attn_logit_softcapping) == (True, 1024, 50)
    assert attention.rope_theta == 500000
    assert attention.rope_hf_config is not None
    assert attention.rope_hf_config.factor == 4


def test_what_is_not_supported_is_said_by_key() -> None:
    data = {**FOUNDRY, "block_overrides": {"order": []}, "use_pad_tok_in_ffn": False}
    with pytest.raises(UserError, match=r"use_pad_tok_in_ffn: .*False is not supported.*block_overrides: .* not sup"):
        from_hugging_face(data, "config.json")


def test_under_transformers_class_wider_keys_are_unclear() -> None:
    data = {**FOUNDRY, "architectures": ["MptForCausalLM"]}
    data["attn_config"] = {**FOUNDRY["attn_config"], "alibi": False}
    with pytest.raises(UserError, match=r"unclear which function is meant: .*attn_config.rope: true.*mptglu"):
        from_hugging_face(data, "config.json")
