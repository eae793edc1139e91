"""Counts by formula against published figures, the built model and torch's counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import flops_per_token, forward_flops_per_token, n_active_params, n_params
from llmtrain.model.mpt import MPT

MPT_7B = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "no_bias": True}

# (d_model, n_heads, n_layers, parameters): llm-foundry's ladder, from its benchmark table
LADDER = [
    (768, 12, 12, 125_311_488),
    (1024, 16, 24, 355_985_408),
    (1536, 12, 24, 760_470_528),
    (2048, 16, 24, 1_315_950_592),
    (2560, 20, 32, 2_651_837_440),
    (4096, 32, 32, 6_658_859_008),
    (5120, 40, 40, 12_853_954_560),
    (7168, 56, 48, 29_975_214_080),
    (8192, 64, 80, 64_862_437_376),
]


def built(config: MPTConfig) -> int:
    return sum(p.numel() for p in MPT(config, device="meta").parameters())


def test_mpt_7b() -> None:
    config = MPTConfig(**MPT_7B, max_seq_len=2048, attn_config={"alibi": True})
    assert n_params(config) == n_active_params(config) == built(config) == 6_649_286_656


@pytest.mark.parametrize(("d_model", "n_heads", "n_layers", "expected"), LADDER)
def test_ladder(d_model: int, n_heads: int, n_layers: int, expected: int) -> None:
    config = MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, vocab_size=50368, max_seq_len=2048)
    assert n_params(config) == built(config) == expected


SMALL = {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 101, "max_seq_len": 40}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"no_bias": True},
    {"no_bias": True, "attention_bias": True},
    {"no_bias": False, "attention_bias": False},
    {"tie_word_embeddings": False},
    {"expansion_ratio": 2.5},
    {"ffn_config": {"ffn_hidden_size": 77}},
    {"norm_type": "rmsnorm"},
    {"learned_pos_emb": False},
    {"attn_config": {"qk_ln": True}},
    {"attn_config": {"qk_ln": True, "alibi": True}, "no_bias": True, "norm_type": "low_precision_rmsnorm"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_of_variants(variant: dict[str, Any]) -> None:
    config = MPTConfig(**SMALL, **variant)
    assert n_params(config) == built(config)


@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": False}, {"expansion_ratio": 2.5}], ids=str)
def test_flops_against_torchs_counter(variant: dict[str, Any]) -> None:
    config = MPTConfig(**SMALL, **{"attn_config": {"attn_impl": "eager", "alibi": True}, **variant})
    model, ids = MPT(config), torch.randint(0, 101, (2, 40))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(ids)
    assert forward.get_total_flops() == 2 * 40 * forward_flops_per_token(config, 40)
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids).loss.backward()
    assert training.get_total_flops() == 2 * 40 * flops_per_token(config, 40)


def test_flops_by_llm_foundrys_formula() -> None:
    """3 * (2 * N + 4 * L * d * T) for each token, as in its published MFU figures."""
    config = MPTConfig(**MPT_7B, attn_config={"alibi": True})
    for seq_len in (2048, 65536):
        expected = 3 * (2 * 6_649_286_656 + 4 * 32 * 4096 * seq_len)
        assert flops_per_token(config, seq_len) == pytest.approx(expected, rel=1e-4)
