"""What the config accepts, refuses and documents, without torch."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.model.config import (
    ActivationConfig,
    AttentionConfig,
    FFNConfig,
    InitConfig,
    MPTConfig,
    RopeDailConfig,
    RopeHFConfig,
)


def test_needs_no_torch() -> None:
    code = "import sys, llmtrain.model.config, llmtrain.model.flops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_llm_foundrys() -> None:
    config = MPTConfig()
    assert (config.d_model, config.n_heads, config.n_layers, config.vocab_size) == (2048, 16, 24, 50368)
    assert (config.expansion_ratio, config.max_seq_len, config.norm_type) == (4, 2048, "low_precision_layernorm")
    assert config.learned_pos_emb
    assert config.uses_learned_positions
    assert not config.no_bias
    assert config.tie_word_embeddings
    assert config.attn_config.attn_impl == "auto"  # the one that differs
    assert config.ffn_hidden_size == 8192
    assert (config.init_config.name, config.init_config.init_div_is_residual) == ("kaiming_normal_", True)


def test_alibi_switches_learned_positions_off() -> None:
    assert not MPTConfig(learned_pos_emb=True, attn_config={"alibi": True}).uses_learned_positions


def test_a_released_config_is_accepted() -> None:
    """Keys as they stand in the released MPT-7B's recipe and config, the plain values of later features included."""
    attn = {
        "attn_type": "multihead_attention",
        "attn_pdrop": 0,
        "attn_impl": "triton",
        "qk_ln": False,
        "clip_qkv": None,
        "softmax_scale": None,
        "prefix_lm": False,
        "attn_uses_sequence_id": False,
        "alibi": True,
        "alibi_bias_max": 8,
        "rope": False,
        "rope_theta": 10000,
        "rope_dail_config": {"type": "original"},
        "sliding_window_size": -1,
        "kv_n_heads": 32,
        "fused_qkv": True,
    }
    config = MPTConfig(
        d_model=4096,
        n_heads=32,
        n_layers=32,
        vocab_size=50432,
        no_bias=True,
        attn_config=attn,
        ffn_config={"ffn_type": "mptmlp", "ffn_act_fn": None},
        init_config=None,
        loss_fn="fused_crossentropy",
        use_cache=False,
        fc_type={"name": "torch"},
        logit_scale=None,
        head_dim=128,
    )
    assert config.init_config == InitConfig()
    assert config.ffn_config.ffn_act_fn == ActivationConfig()


def rope(**options: Any) -> dict[str, Any]:
    return {"attn_config": {"rope": True, **options}}


def hf_rope(scaling: str, **options: Any) -> dict[str, Any]:
    return rope(rope_impl="hf", rope_hf_config={"type": scaling, **options})


def grouped(kv_n_heads: int | None) -> dict[str, Any]:
    return {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": kv_n_heads}}


TEMPERATURE = ("attn_config", "attn_temperature_tuning")


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({"d_model": 100, "n_heads": 16}, (), "d_model: 100 must be a multiple of n_heads: 16"),
        ({"d_model": 32, "expansion_ratio": 1.3}, (), "must be an integer"),
        ({"resid_pdrop": 1.5}, ("resid_pdrop",), "less than or equal to 1"),
        ({"emb_pdrop": -0.1}, ("emb_pdrop",), "greater than or equal to 0"),
        ({"attn_config": {"attn_pdrop": 2}}, ("attn_config", "attn_pdrop"), "less than or equal to 1"),
        ({"embedding_fraction": 0}, ("embedding_fraction",), "greater than 0"),
        ({"logit_scale": 0}, ("logit_scale",), "all logits equal"),
        ({"n_heads": 0}, ("n_heads",), "greater than 0"),
        ({"alibi": True}, ("alibi",), "Extra inputs"),
        ({"attn_config": {"alibi_bias": 8}}, ("attn_config", "alibi_bias"), "Extra inputs"),
        ({"norm_type": "batchnorm"}, ("norm_type",), "layernorm"),
        ({"attn_config": {"rope": True, "alibi": True}}, ("attn_config",), "rope and alibi are both positions"),
        ({"attn_config": {"rope": True}, "head_dim": 65}, (), "rope turns pairs, but heads have a width of 65"),
        ({"attn_config": {"rope_impl": "flash"}}, ("attn_config", "rope_impl"), "'dail' or 'hf'"),
        (rope(rope_dail_config={"type": "xpos"}), ("attn_config",), "xpos is not supported; set it to original"),
        (rope(rope_dail_config={"pos_idx_in_fp32": False}), ("attn_config",), "never rounded; set it to true"),
        (rope(rope_hf_config={"type": "linear", "factor": 2}), ("attn_config",), "linear is read with rope_impl: hf"),
        (hf_rope("yarn"), ("attn_config", "rope_hf_config", "type"), "'no_scaling', 'linear', 'dynamic' or 'llama3'"),
        (hf_rope("no_scaling", factor=2), ("attn_config", "rope_hf_config"), "factor: 2 means nothing with"),
        (hf_rope("linear", factor=0.5), ("attn_config", "rope_hf_config", "factor"), "greater than or equal to 1"),
        (hf_rope("llama3", factor=8), ("attn_config", "rope_hf_config"), "low_freq_factor is required with type: lla"),
        (hf_rope("linear", low_freq_factor=1), ("attn_config", "rope_hf_config"), "means nothing with type: linear"),
        ({"attn_config": {"nope": True}}, ("attn_config", "nope"), "True is not supported; .*set it to false"),
        ({"attn_config": {"sliding_window_size": 0}}, ("attn_config", "sliding_window_size"), "or -1 for all"),
        ({"attn_config": {"attn_logit_softcapping": 0}}, ("attn_config", "attn_logit_softcapping"), "greater than 0"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}}, TEMPERATURE, "attn_scale: 0.1 is not sup"),
        ({"attn_config": {"qk_ln": True, "qk_gn": True}}, ("attn_config",), "set one of them to false"),
        ({"attn_config": {"kv_n_heads": 4}}, (), "n_heads: 16 of them; set attn_type: grouped_query_attention"),
        (grouped(3), (), "n_heads: 16 must be a multiple of attn_config.kv_n_heads: 3"),
        (grouped(32), (), "n_heads: 16 must be a multiple of attn_config.kv_n_heads: 32"),
        (grouped(None), ("attn_config",), "grouped_query_attention needs kv_n_heads"),
        ({"attn_config": {"attn_type": "multiquery_attention", "kv_n_heads": 2}}, ("attn_config",), "which has one"),
        ({"ffn_config": {"ffn_type": "mb_dmoe"}}, ("ffn_config", "ffn_type"), "not supported; .*'mptmlp' or 'mptglu'"),
        ({"ffn_config": {"ffn_type": "te_ln_mlp"}}, ("ffn_config", "ffn_type"), "not supported"),
        ({"fc_type": "te"}, ("fc_type",), "not supported"),
        ({"block_overrides": {"order": []}}, ("block_overrides",), "set it to null"),
        ({"head_dim": 0}, ("head_dim",), "greater than 0"),
        ({"final_logit_softcapping": 0}, ("final_logit_softcapping",), "greater than 0"),
        ({"init_config": {"name": "baseline_"}}, ("init_config",), "init_std is required"),
        ({"init_config": {"name": "xavier_uniform_"}}, ("init_config",), "init_gain must be above 0"),
        ({"init_config": {"init_div_is_residual": -1}}, ("init_config", "init_div_is_residual"), "above 0"),
        ({"init_config": {"emb_init_uniform_lim": [1, 0]}}, ("init_config",), "must be"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], place: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        MPTConfig(**options)
    assert [e["loc"] for e in caught.value.errors()] == [place]


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        MPTConfig(emb_pdrop=3, attn_config={"nope": True, "attn_impl": "flexible"}, typo=1)
    assert len(caught.value.errors()) == 4


@pytest.mark.parametrize(("given", "meant"), [(1, 1.0), (True, True), (False, False), ("2.5", 2.5)])
def test_numbers_and_switches_stay_apart(given: Any, meant: Any) -> None:
    value = InitConfig(init_div_is_residual=given).init_div_is_residual
    assert value == meant
    assert type(value) is type(meant)


def test_heads() -> None:
    assert MPTConfig().qkv_rows == (2048, 2048, 2048)
    assert MPTConfig(**grouped(4)).qkv_rows == (2048, 512, 512)
    assert MPTConfig(attn_config={"attn_type": "multiquery_attention"}, head_dim=72).qkv_rows == (1152, 72, 72)
    assert MPTConfig(**grouped(16)).kv_heads == 16
    assert MPTConfig(d_model=100, head_dim=9).softmax_scale == pytest.approx(1 / 3)


def test_what_llm_foundry_writes_is_accepted() -> None:
    """All keys that its MPTConfig fills in for an attention block, at their defaults."""
    attn = {
        "attn_type": "multihead_attention",
        "qk_gn": False,
        "attn_logit_softcapping": None,
        "rope": False,
        "nope": False,
        "rope_theta": 10000,
        "rope_impl": "dail",
        "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
        "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
        "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
        "kv_dim": None,
    }
    config = MPTConfig(attn_config=attn)
    assert config.uses_learned_positions
    assert not MPTConfig(attn_config={**attn, "rope": True}).uses_learned_positions


CONFIGS = [MPTConfig, AttentionConfig, RopeDailConfig, RopeHFConfig, FFNConfig, InitConfig, ActivationConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_documented(config: type[Any]) -> None:
    assert [name for name, field in config.model_fields.items() if not field.description] == []
