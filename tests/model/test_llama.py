"""Wider configs are Llamas and Mistrals: the same weights in transformers' models give the same logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llmtrain.generation.decoder import CachedDecoder
from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT

VOCAB, LENGTH = 160, 96
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS: list[dict[str, Any]] = [
    {"type": "no_scaling"},
    {"type": "linear", "factor": 4.0},
    {"type": "dynamic", "factor": 2.0},
    {"type": "llama3", **LLAMA3},
]


def mpt(kv_n_heads: int = 2, max_seq_len: int = 256, **attn: Any) -> MPT:
    """In a Llama's shape: grouped heads, rotary positions, RMS norms, gated silu, an untied head and no bias."""
    config = MPTConfig(
        d_model=64,
        n_heads=8,
        n_layers=2,
        vocab_size=VOCAB,
        max_seq_len=max_seq_len,
        no_bias=True,
        norm_type="rmsnorm",
        norm_eps=1e-6,
        tie_word_embeddings=False,
        ffn_config={"ffn_type": "mptglu", "ffn_hidden_size": 112, "ffn_act_fn": {"name": "silu"}},
        attn_config={"attn_type": "grouped_query_attention", "kv_n_heads": kv_n_heads, "rope": True, **attn},
    )
    torch.manual_seed(0)
    model = MPT(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def as_llama(weights: dict[str, Tensor], kv_n_heads: int) -> dict[str, Tensor]:
    """Our names and the fused projection -> those of transformers."""
    renamed = {
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.out_proj": "self_attn.o_proj",
        **{f"ffn.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    }
    found = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.norm_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(2):
        ours, theirs = f"transformer.blocks.{layer}.", f"model.layers.{layer}."
        for mine, name in renamed.items():
            found[f"{theirs}{name}.weight"] = weights[f"{ours}{mine}.weight"]
        parts = weights[f"{ours}attn.Wqkv.weight"].split([64, 8 * kv_n_heads, 8 * kv_n_heads])
        for mine, part in zip("qkv", parts, strict=True):
            found[f"{theirs}self_attn.{mine}_proj.weight"] = part
    return found


def hugging_face(kind: Any, config: Any, ours: MPT, kv_n_heads: int = 2, **options: Any) -> Any:
    theirs = kind(
        config(
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=kv_n_heads,
            vocab_size=VOCAB,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            attn_implementation="eager",
            **options,
        )
    )
    report = theirs.load_state_dict(as_llama(ours.state_dict(), kv_n_heads))
    assert not report.missing_keys
    assert not report.unexpected_keys
    return theirs.eval()


def ids_and_mask(rows: int = 2, pad: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids, mask


@pytest.mark.parametrize("pad", [0, 11], ids=["unpadded", "padded"])
@pytest.mark.parametrize("kv_n_heads", [1, 2, 8])
@torch.no_grad()
def test_llama(kv_n_heads: int, pad: int) -> None:
    ours = mpt(kv_n_heads)
    theirs = hugging_face(LlamaForCausalLM, LlamaConfig, ours, kv_n_heads, rope_theta=10000.0)
    ids, mask = ids_and_mask(pad=pad)
    given = mask if pad else None
    difference = ours(ids, attention_mask=given).logits - theirs(ids, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() <= 2e-5


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["type"])
@torch.no_grad()
def test_rope_scaling(scaling: dict[str, Any]) -> None:
    """`dynamic` is beyond its max_seq_len here."""
    ours = mpt(rope_theta=500.0, rope_impl="hf", rope_hf_config=scaling, max_seq_len=64)
    theirs_says = {"rope_type": scaling["type"].replace("no_scaling", "default"), **scaling, "rope_theta": 500.0}
    theirs_says.pop("type")
    options = {"rope_theta": 500.0, "max_position_embeddings": 64, "rope_scaling": theirs_says}
    theirs = hugging_face(LlamaForCausalLM, LlamaConfig, ours, **options)
    ids, mask = ids_and_mask(1)
    exact = theirs(ids).logits
    assert (ours(ids).logits - exact).abs().max() <= 2e-5
    assert (CachedDecoder(ours, chunk=20)(ids, mask.bool()) - exact[:, -1]).abs().max() <= 2e-5
    plain = mpt(rope_theta=500.0, max_seq_len=64)(ids).logits
    assert (scaling["type"] == "no_scaling") == ((plain - exact).abs().max() < 1e-3)


@torch.no_grad()
def test_mistral_counts_the_token_itself() -> None:
    """Its sliding_window 16 is our sliding_window_size 15, whole and with a cache that keeps no more than that."""
    ours = mpt(sliding_window_size=15)
    options = {"rope_theta": 10000.0, "sliding_window": 16, "head_dim": 8}
    theirs = hugging_face(MistralForCausalLM, MistralConfig, ours, **options)
    ids, _ = ids_and_mask()
    exact = theirs(ids).logits
    assert (ours(ids).logits - exact).abs().max() <= 2e-5
    assert (mpt(sliding_window_size=16)(ids).logits - exact).abs().max() > 1e-3
    cache, parts = KVCache(2, window=15), []
    for start in range(0, LENGTH, 8):
        parts.append(ours(ids[:, start : start + 8], cache=cache).logits)
    assert (torch.cat(parts, 1) - exact).abs().max() <= 2e-5
