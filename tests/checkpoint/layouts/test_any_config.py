"""Whatever can be configured: the chosen layout computes our function."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint import compare
from llmtrain.checkpoint.hugging_face import read_hf_folder, write_hf_folder
from llmtrain.checkpoint.layouts import choose_layout
from llmtrain.checkpoint.weights import InMemory
from llmtrain.model.config import MPTConfig

from .conftest import config_of, weights_of


@st.composite
def scalings(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["no_scaling", "linear", "dynamic", "llama3"]))
    if kind == "no_scaling":
        return {}
    found: dict[str, Any] = {"type": kind, "factor": draw(st.sampled_from([1.5, 4.0]))}
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_impl": "hf", "rope_hf_config": found}


@st.composite
def configs(draw: st.DrawFn) -> MPTConfig:
    def maybe(*values: Any) -> Any:
        return draw(st.sampled_from([None, *values]))

    heads = draw(st.sampled_from([2, 4, 6]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    kind = "multihead" if kv_heads == heads else "multiquery" if kv_heads == 1 else "grouped_query"
    positions = draw(st.sampled_from(["alibi", "rope", "learned", "none"]))
    norm = draw(st.sampled_from(["none", "qk_ln", "qk_gn"]))
    attention: dict[str, Any] = {
        "attn_type": f"{kind}_attention",
        "kv_n_heads": kv_heads,
        "alibi": positions == "alibi",
        "alibi_bias_max": draw(st.sampled_from([4, 8, 16])),
        "rope": positions == "rope",
        "rope_theta": draw(st.sampled_from([10000, 500000])),
        **({norm: True} if norm != "none" else {}),
        **(draw(scalings()) if positions == "rope" else {}),
        "clip_qkv": maybe(0.7),
        "softmax_scale": maybe(0.3),
        "attn_logit_softcapping": maybe(3.0),
        "sliding_window_size": draw(st.sampled_from([-1, 5, 40])),
        "fused_qkv": draw(st.booleans()),
    }
    name = draw(st.sampled_from(["gelu", "relu", "silu", "quick_gelu"]))
    return config_of(
        d_model=48,
        n_heads=heads,
        n_layers=draw(st.integers(1, 2)),
        head_dim=maybe(10),
        learned_pos_emb=positions == "learned",
        attn_config=attention,
        ffn_config={
            "ffn_type": draw(st.sampled_from(["mptmlp", "mptglu"])),
            "ffn_hidden_size": maybe(56),
            "ffn_act_fn": {"name": name, "approximate": draw(st.sampled_from(["none", "tanh"]))},
        },
        norm_type=draw(st.sampled_from(["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        no_bias=draw(st.booleans()),
        attention_bias=maybe(True, False),
        logit_scale=maybe(0.5, "inv_sqrt_d_model"),
        final_logit_softcapping=maybe(4.0),
        tie_word_embeddings=draw(st.booleans()),
        embedding_fraction=draw(st.sampled_from([1.0, 0.1])),
    )


def exported_exactly(config: MPTConfig) -> None:
    layout = choose_layout(config, with_code=True, where="test")
    weights = weights_of(config)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        folder.mkdir()
        write_hf_folder(folder, config, weights, dtype="float32", tokenizer=None, layout=layout)
        result = compare.compare_with_transformers(folder, layout, config, InMemory(weights), None)
        assert result.problems == []
        assert result.tokens > 0
        back, _ = read_hf_folder(folder)
        assert layout.config_json(back, "float32", {}) == layout.config_json(config, "float32", {})


SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=8, derandomize=True, **SETTINGS)
@given(configs())
def test_any_config_is_exported_exactly(config: MPTConfig) -> None:
    exported_exactly(config)


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=400, **SETTINGS)
@given(configs())
def test_many_configs_are_exported_exactly(config: MPTConfig) -> None:
    exported_exactly(config)
