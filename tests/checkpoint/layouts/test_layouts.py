"""Each model is written under a class of transformers that computes its function; each is opened and compared."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.checkpoint import compare
from llmtrain.checkpoint.hugging_face import read_hf_folder
from llmtrain.checkpoint.hugging_face_config import inexpressible
from llmtrain.checkpoint.layouts import choose_layout
from llmtrain.checkpoint.weights import InMemory
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig

from .conftest import Written, config_of

ALIBI = {"alibi": True}
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
LLAMA3 = {
    "type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(gate: dict[str, Any] | None = None, **attention: Any) -> dict[str, Any]:
    activation = gate or {"name": "silu"}
    return {
        "no_bias": True,
        "norm_type": "rmsnorm",
        "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": activation},
        "attn_config": {"rope": True, **attention},
    }


def scaled(**scaling: Any) -> dict[str, Any]:
    return {"rope_impl": "hf", "rope_hf_config": scaling}


PLAIN: dict[str, dict[str, Any]] = {
    "mpt": {"no_bias": True, "attn_config": ALIBI},
    "llama": llama(),
    "llama, grouped": llama(**GROUPED, rope_theta=500000),
    "llama, multi-query, untied": {**llama(attn_type="multiquery_attention"), "tie_word_embeddings": False},
    "llama, biases": {**llama(), "no_bias": False},
    "llama, linear": llama(**scaled(type="linear", factor=3)),
    "llama, llama3": llama(**scaled(**LLAMA3)),
    "llama, apart": llama(fused_qkv=False),
    "llama, wide heads": {**llama(), "head_dim": 16, "norm_type": "low_precision_rmsnorm"},
    "llama, tanh": llama({"name": "gelu", "approximate": "tanh"}),
    "llama, gelu": llama({"name": "gelu"}),
    "llama, quick": llama({"name": "quick_gelu"}),
    "llama, relu": llama({"name": "relu"}),
    "mistral": llama(sliding_window_size=9),
    "mistral, grouped, llama3": llama(sliding_window_size=9, **GROUPED, **scaled(**LLAMA3)),
    "mistral, linear": llama(sliding_window_size=70, **scaled(type="linear", factor=2)),
}
CODE: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "no positions": {"learned_pos_emb": False},
    "alibi 16": {"attn_config": {**ALIBI, "alibi_bias_max": 16}},
    "five heads": {"d_model": 60, "n_heads": 5, "attn_config": {**ALIBI, "alibi_bias_max": 12}},
    "qk_ln": {"attn_config": {**ALIBI, "qk_ln": True}},
    "qk_gn": {"attn_config": {**ALIBI, "qk_gn": True}},
    "qk_ln, rms, grouped": {"attn_config": {**ALIBI, "qk_ln": True, **GROUPED}, "norm_type": "rmsnorm"},
    "qk_gn, rope": llama(qk_gn=True),
    "ratio 2": {"expansion_ratio": 2, "attn_config": ALIBI},
    "scaled logits": {"logit_scale": "inv_sqrt_d_model", "attn_config": ALIBI},
    "doubled logits": {"logit_scale": 2.0, "attn_config": ALIBI},
    "biases": {"no_bias": False, "attn_config": ALIBI},
    "bias of Wqkv": {"no_bias": True, "attention_bias": True, "attn_config": ALIBI},
    "no bias of Wqkv": {**llama(), "no_bias": False, "attention_bias": False},
    "rms": {"norm_type": "low_precision_rmsnorm", "attn_config": ALIBI},
    "grouped": {"attn_config": {**ALIBI, **GROUPED}},
    "multi-query": {"attn_config": {**ALIBI, "attn_type": "multiquery_attention"}},
    "apart": {"attn_config": {**ALIBI, "fused_qkv": False}},
    "window": {"attn_config": {**ALIBI, "sliding_window_size": 7}},
    "capped scores": {"attn_config": {**ALIBI, "attn_logit_softcapping": 2.0}},
    "capped logits": {"attn_config": ALIBI, "final_logit_softcapping": 1.5},
    "clipped": {"attn_config": {**ALIBI, "clip_qkv": 0.5}, "no_bias": False},
    "another softmax": llama(softmax_scale=0.4),
    "wide heads": {"head_dim": 16, "attn_config": ALIBI},
    "gate": {"ffn_config": {"ffn_type": "mptglu"}, "attn_config": ALIBI},
    "relu": {"ffn_config": {"ffn_act_fn": {"name": "relu"}}, "attn_config": ALIBI},
    "silu": {"ffn_config": {"ffn_act_fn": {"name": "silu"}}, "attn_config": ALIBI},
    "tanh": {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "attn_config": ALIBI},
    "quick": {"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}, "attn_config": ALIBI},
    "untied": {"tie_word_embeddings": False},
    "rope, layer norms": {"attn_config": {"rope": True}},
    "rope, linear": {"attn_config": {"rope": True, **scaled(type="linear", factor=3)}},
    "rope, llama3": {"attn_config": {"rope": True, **scaled(**LLAMA3)}},
    "rope, dynamic": llama(**scaled(type="dynamic", factor=2)),
}


def check(made: Written) -> None:
    """Plain transformers computes the same; and what is read back is the same model."""
    folder, layout, config, weights = made
    result = compare.compare_with_transformers(folder, layout, config, InMemory(weights), None)
    assert result.problems == []
    assert result.max_difference <= result.tolerance
    assert result.tokens == 3 * compare.GREEDY_TOKENS
    back, found = read_hf_folder(folder)
    assert layout.config_json(back, "float32", {}) == layout.config_json(config, "float32", {})
    if config.attn_config.fused_qkv == back.attn_config.fused_qkv:
        assert set(found) == set(weights)
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    else:
        assert torch.equal(
            found["transformer.blocks.1.attn.Wqkv.weight"],
            torch.cat([weights[f"transformer.blocks.1.attn.W{x}.weight"] for x in "qkv"]),
        )


@pytest.mark.parametrize("name", PLAIN)
def test_as_a_class_of_transformers(written: Callable[..., Written], name: str) -> None:
    made = written(**PLAIN[name])
    assert made[1].name == name.partition(",")[0]
    assert (made[1].reason is None) == (name == "mpt")
    assert not list(made[0].glob("*.py"))
    check(made)


@pytest.mark.parametrize("name", CODE)
def test_with_code(written: Callable[..., Written], name: str) -> None:
    config = config_of(**CODE[name])
    with pytest.raises(UserError, match="--with-code") as refused:
        choose_layout(config, with_code=False, where="test")
    assert all(problem in str(refused.value) for problem in inexpressible(config))
    made = written(**CODE[name])
    assert made[1].name == "code"
    assert made[1].reason is not None
    assert all(problem in made[1].reason for problem in inexpressible(config))
    check(made)


@pytest.mark.parametrize("name", ["mpt", "llama, biases", "mistral, grouped, llama3", "untied", "qk_gn, rope"])
def test_block_by_block(written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(compare, "WHOLE", 0)
    check(written(**{**PLAIN, **CODE}[name]))


IGNORED = {
    "llama, llama3": {"rope_scaling": None},
    "llama, grouped": {"rope_theta": 10000.0},
    "mistral": {"sliding_window": 9},  # ours, without the token itself
    "llama, wide heads": {"rms_norm_eps": 1e-2},
    "alibi 16": {"alibi_bias_max": 8},
    "window": {"window": None},
    "capped scores": {"score_cap": None},
    "capped logits": {"logit_cap": None},
    "doubled logits": {"logit_factor": None},
    "clipped": {"clip_qkv": None},
    "another softmax": {"softmax_scale": None},
    "tanh": {"activation": "relu"},
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_key_that_were_ignored_would_show(written: Callable[..., Written], name: str) -> None:
    folder, layout, config, weights = written(**{**PLAIN, **CODE}[name])
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **IGNORED[name]}))
    result = compare.compare_with_transformers(folder, layout, config, InMemory(weights), None)
    assert "logits differ" in result.problems[0]
    assert result.max_difference > 20 * result.tolerance


def test_code_that_is_not_ours_is_not_run(written: Callable[..., Written]) -> None:
    folder, layout, config, weights = written(**CODE["alibi 16"])
    with (folder / "modeling_llmtrain.py").open("a") as file:
        file.write("raise SystemExit\n")
    result = compare.compare_with_transformers(folder, layout, config, InMemory(weights), None)
    assert "code that is not llmtrain's" in result.problems[0]


def test_the_modelling_file_knows_every_key(written: Callable[..., Written]) -> None:
    """And without trust_remote_code the folder opens as nothing else."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, _, _, _ = written(**CODE["qk_gn, rope"])
    content = json.loads((folder / "config.json").read_text())
    opened = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    of_transformers = {"architectures", "model_type", "auto_map", "torch_dtype"}
    of_transformers |= {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    known = set(type(opened).__init__.__code__.co_varnames)
    assert content.keys() - of_transformers <= known
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_other_llamas_are_refused_by_key() -> None:
    from llmtrain.checkpoint.hugging_face_config import from_hugging_face

    config = config_of(**PLAIN["llama"])
    data = choose_layout(config, with_code=False, where="test").config_json(config, "float32", {})
    assert isinstance(from_hugging_face(data, "config.json"), MPTConfig)
    for change in (
        {"attention_bias": True},
        {"hidden_act": "mish"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(UserError, match="cannot compute"):
            from_hugging_face({**data, **change}, "config.json")
    with pytest.raises(UserError, match="cannot be read as llama: KeyError"):
        from_hugging_face({"model_type": "llama"}, "config.json")
