"""Initial weights: statistics per slice, divisors, meta construction, sharded parameters."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.model.config import MPTConfig
from llmtrain.model.init import init_module
from llmtrain.model.mpt import MPT

D, HEADS, LAYERS, VOCAB = 128, 4, 3, 512


def config(name: str = "kaiming_normal_", **options: Any) -> MPTConfig:
    model = {key: options.pop(key) for key in ("no_bias", "tie_word_embeddings", "norm_type") if key in options}
    return MPTConfig(
        d_model=D,
        n_heads=HEADS,
        n_layers=LAYERS,
        vocab_size=VOCAB,
        max_seq_len=64,
        init_config={"name": name, **options},
        attn_config={"qk_ln": True},
        **model,
    )


def build(name: str = "kaiming_normal_", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {n: p.detach() for n, p in MPT(config(name, **options)).named_parameters()}


def assert_std(t: Tensor, expected: float) -> None:
    """Within five standard errors (normal: std / sqrt(2n)); uniform has a smaller one."""
    assert t.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * t.numel()))
    assert abs(t.mean().item()) < 5 * expected / math.sqrt(t.numel())


RESIDUAL = math.sqrt(2 * LAYERS)
SMALL = math.sqrt(2 / (5 * D))
HEAD = D // HEADS  # rows of a slice of Wqkv

# scheme, its options, then std of: a slice of Wqkv, up_proj, the embedding, down_proj before the divisor, the divisor
SCHEMES: list[tuple[str, dict[str, Any], float, float, float, float, float]] = [
    ("kaiming_normal_", {}, *(math.sqrt(2 / n) for n in (D, D, D, 4 * D)), RESIDUAL),
    ("kaiming_uniform_", {}, *(math.sqrt(2 / n) for n in (D, D, D, 4 * D)), RESIDUAL),
    ("kaiming_normal_", {"fan_mode": "fan_out"}, *(math.sqrt(2 / n) for n in (HEAD, 4 * D, VOCAB, D)), RESIDUAL),
    ("kaiming_normal_", {"init_nonlinearity": "linear"}, *(math.sqrt(1 / n) for n in (D, D, D, 4 * D)), RESIDUAL),
    ("xavier_normal_", {"init_gain": 1}, *(math.sqrt(2 / n) for n in (D + HEAD, 5 * D, D + VOCAB, 5 * D)), RESIDUAL),
    (
        "xavier_uniform_",
        {"init_gain": 2},
        *(2 * math.sqrt(2 / n) for n in (D + HEAD, 5 * D, D + VOCAB, 5 * D)),
        RESIDUAL,
    ),
    ("small_init_", {}, SMALL, SMALL, SMALL, SMALL, RESIDUAL),
    ("neox_init_", {}, SMALL, SMALL, SMALL, SMALL, LAYERS / math.sqrt(10)),
    ("baseline_", {"init_std": 0.02}, 0.02, 0.02, 0.02, 0.02, RESIDUAL),
    ("baseline_", {"init_std": 0.02, "init_div_is_residual": False}, 0.02, 0.02, 0.02, 0.02, 1.0),
    ("baseline_", {"init_std": 0.02, "init_div_is_residual": "2.5"}, 0.02, 0.02, 0.02, 0.02, 2.5),
    ("default_", {}, *(1 / math.sqrt(3 * n) for n in (D, D)), 1.0, 1 / math.sqrt(3 * 4 * D), 1.0),
]


@pytest.mark.parametrize(("name", "options", "qkv", "up", "embedding", "down", "divisor"), SCHEMES)
def test_standard_deviations(
    name: str, options: dict[str, Any], qkv: float, up: float, embedding: float, down: float, divisor: float
) -> None:
    weights = build(name, **options)
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}."
        for piece in weights[block + "attn.Wqkv.weight"].split(HEAD):
            assert_std(piece, qkv)
        assert_std(weights[block + "ffn.up_proj.weight"], up)
        assert_std(weights[block + "ffn.down_proj.weight"], down / divisor)
    assert_std(weights["transformer.wte.weight"], embedding)
    largest = weights["transformer.blocks.0.ffn.up_proj.weight"].abs().max()
    assert (largest <= math.sqrt(3) * up * 1.0001) == ("uniform" in name or name == "default_")
    for n, t in weights.items():
        if "bias" in n:
            assert bool(t.any()) == (name == "default_" and "norm" not in n and "_ln" not in n), n
        elif "norm" in n or "_ln" in n:
            assert (t == 1).all()


def test_out_proj_is_a_residual_projection() -> None:
    assert_std(build()["transformer.blocks.0.attn.out_proj.weight"], math.sqrt(2 / D) / RESIDUAL)


def test_neox_residual_std_is_wang_and_komatsuzakis() -> None:
    assert_std(build("neox_init_")["transformer.blocks.0.ffn.down_proj.weight"], 2 / (LAYERS * math.sqrt(D)))


def test_embedding_has_its_own_scale() -> None:
    assert_std(build(emb_init_std=0.3)["transformer.wte.weight"], 0.3)
    assert_std(build(emb_init_std=0.3)["transformer.wpe.weight"], 0.3)
    t = build(emb_init_uniform_lim=0.3)["transformer.wte.weight"]
    assert -0.3 <= t.min() < -0.29 < 0.29 < t.max() <= 0.3
    t = build(emb_init_uniform_lim=[0.1, 0.2])["transformer.wte.weight"]
    assert 0.1 <= t.min() < 0.11 < 0.19 < t.max() <= 0.2


@pytest.mark.parametrize("norm_type", ["low_precision_layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_meta_then_param_init_touches_everything(tied: bool, norm_type: str) -> None:
    """As Composer does it: one module at a time, children first, memory filled with rubbish before."""
    cfg = config(tie_word_embeddings=tied, norm_type=norm_type)
    model = MPT(cfg, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    torch.manual_seed(0)
    model.apply(model.param_init_fn)
    assert all(p.isfinite().all() for p in model.parameters())
    torch.manual_seed(0)
    for (name, a), (_, b) in zip(model.named_parameters(), MPT(cfg).named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_module_without_a_rule_is_an_error() -> None:
    with pytest.raises(TypeError, match="Conv1d"):
        init_module(nn.Conv1d(1, 1, 1), config())
    init_module(nn.Sequential(nn.Conv1d(1, 1, 1)), config())  # owns nothing itself


def test_slices_of_grouped_heads_and_gates() -> None:
    """Each head of queries, keys and values has its own fan; the gate is drawn as up_proj is, down_proj is divided."""
    torch.manual_seed(0)
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_gn": True}
    init = {"name": "xavier_normal_", "init_gain": 1}
    wide = MPTConfig(
        d_model=D, n_heads=HEADS, n_layers=LAYERS, vocab_size=VOCAB, head_dim=48, attn_config=attn, init_config=init,
        ffn_config={"ffn_type": "mptglu"},
    )  # fmt: skip
    weights = {n: p.detach() for n, p in MPT(wide).named_parameters()}
    for layer in range(LAYERS):
        block = f"transformer.blocks.{layer}."
        pieces = weights[block + "attn.Wqkv.weight"].split(48)
        assert len(pieces) == HEADS + 2 + 2
        for piece in pieces:
            assert_std(piece, math.sqrt(2 / (D + 48)))
        assert_std(weights[block + "ffn.gate_proj.weight"], math.sqrt(2 / (5 * D)))
        assert_std(weights[block + "ffn.down_proj.weight"], math.sqrt(2 / (5 * D)) / RESIDUAL)
        assert_std(weights[block + "attn.out_proj.weight"], math.sqrt(2 / (D + HEADS * 48)) / RESIDUAL)
        for norm in ("q_ln", "k_ln"):
            assert torch.equal(weights[f"{block}attn.{norm}.weight"], torch.ones(48))
