"""Wider configs against the same model written down once more, in float64 and sharing no code with llmtrain."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import flops_per_token, forward_flops_per_token, n_params
from llmtrain.model.mpt import MPT

VOCAB, HEADS = 61, 6
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
ROPE = {"rope": True, "rope_theta": 300.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-alibi": {"attn_config": {**GROUPED, "alibi": True}},
    "multiquery-rope": {"attn_config": {"attn_type": "multiquery_attention", **ROPE}},
    "unfused": {"attn_config": {**GROUPED, **ROPE, "fused_qkv": False}},
    "window": {"attn_config": {"alibi": True, "sliding_window_size": 7}},
    "window-rope": {"attn_config": {**GROUPED, **ROPE, "sliding_window_size": 3}},
    "glu": {"ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}}, "attn_config": {"alibi": True}},
    "qk_gn": {"attn_config": {**GROUPED, **ROPE, "qk_gn": True, "clip_qkv": 2.0}},
    "qk_ln": {"attn_config": {**GROUPED, "alibi": True, "qk_ln": True}},
    "softcaps": {"attn_config": {"alibi": True, "attn_logit_softcapping": 0.5}, "final_logit_softcapping": 2.0},
    "head_dim": {"head_dim": 14, "attn_config": {**GROUPED, **ROPE}},
    "all": {
        "head_dim": 10,
        "norm_type": "rmsnorm",
        "no_bias": True,
        "tie_word_embeddings": False,
        "logit_scale": 0.5,
        "final_logit_softcapping": 3.0,
        "ffn_config": {"ffn_type": "mptglu"},
        "attn_config": {**GROUPED, **ROPE, "qk_gn": True, "sliding_window_size": 9, "attn_logit_softcapping": 2.0},
    },
}


def build(name: str, **attn: Any) -> MPT:
    options = VARIANTS[name]
    sizes = {"d_model": 48, "n_heads": HEADS, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 64}
    torch.manual_seed(3)
    model = MPT(MPTConfig(**{**sizes, **options, "attn_config": {**options["attn_config"], **attn}}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def reference(model: MPT, ids: Tensor) -> Tensor:
    """Logits (batch, T, vocab) of whole rows without padding."""
    w, c = model.state_dict(), model.config
    a, length, width = c.attn_config, ids.shape[1], c.head_dim or c.d_model // HEADS
    kv = {"multiquery_attention": 1, "grouped_query_attention": a.kv_n_heads}.get(a.attn_type) or HEADS

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        weight = w[name + ".weight"]
        if c.norm_type == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return F.layer_norm(x, weight.shape, weight, w.get(name + ".bias"), 1e-5)

    def rotate(x: Tensor) -> Tensor:
        """Complex numbers (x[i] + i x[i + half]) times e^(i position frequency)."""
        half = width // 2
        frequency = a.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = (j <= i) & ((i - j <= a.sliding_window_size) | (a.sliding_window_size < 0))
    slopes = [2.0 ** (-8 * n / 8) for n in range(1, 9)]
    slopes = (slopes[1::2] + slopes[0::2])[:HEADS]
    x = w["transformer.wte.weight"][ids]
    for layer in range(c.n_layers):
        at = f"transformer.blocks.{layer}."
        h = norm(x, at + "norm_1")
        if a.fused_qkv:
            q, k, v = linear(h, at + "attn.Wqkv").split([HEADS * width, kv * width, kv * width], -1)
        else:
            q, k, v = (linear(h, f"{at}attn.{name}") for name in ("Wq", "Wk", "Wv"))
        if a.clip_qkv:
            q, k, v = (t.clamp(-a.clip_qkv, a.clip_qkv) for t in (q, k, v))
        if a.qk_ln:
            q, k = norm(q, at + "attn.q_ln"), norm(k, at + "attn.k_ln")
        q, k, v = (t.reshape(*ids.shape, -1, width).transpose(1, 2) for t in (q, k, v))
        if a.qk_gn:
            q, k = norm(q, at + "attn.q_ln"), norm(k, at + "attn.k_ln")
        if a.rope:
            q, k = rotate(q), rotate(k)
        heads = []
        for head in range(HEADS):
            of = head * kv // HEADS
            scores = q[:, head] @ k[:, of].transpose(1, 2) / math.sqrt(width)
            if a.attn_logit_softcapping:
                scores = a.attn_logit_softcapping * torch.tanh(scores / a.attn_logit_softcapping)
            if a.alibi:
                scores = scores + slopes[head] * (j - i)
            heads.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[:, of])
        x = x + linear(torch.cat(heads, -1), at + "attn.out_proj")
        h = norm(x, at + "norm_2")
        up = linear(h, at + "ffn.up_proj")
        act = F.silu if c.ffn_config.ffn_act_fn.name == "silu" else F.gelu
        gated = c.ffn_config.ffn_type == "mptglu"
        x = x + linear(act(linear(h, at + "ffn.gate_proj")) * up if gated else act(up), at + "ffn.down_proj")
    head = w["transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"]
    logits = norm(x, "transformer.norm_f") @ head.T * (c.logit_scale or 1)
    cap = c.final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn_impl", ["auto", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_and_loss(name: str, attn_impl: str) -> None:
    model, ids = build(name, attn_impl=attn_impl), tokens(2, 40)
    exact = reference(model, ids)
    torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=1e-10)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, F.cross_entropy(exact[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    half = model.float()(ids).logits
    assert (half - exact).abs().max() < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_and_is_counted(name: str) -> None:
    model, ids = build(name), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert n_params(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_on_the_left_moves_nothing(name: str) -> None:
    model, ids = build(name), tokens(1, 20)
    mask = F.pad(torch.ones_like(ids), (7, 0))
    padded = model(F.pad(ids, (7, 0), value=5), attention_mask=mask).logits[:, 7:]
    torch.testing.assert_close(padded, model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_packed_documents_start_over(name: str) -> None:
    model, ids = build(name, attn_uses_sequence_id=True), tokens(1, 33)
    packed = model(ids, sequence_id=torch.tensor([[0] * 5 + [1] * 17 + [2] * 11])).logits
    alone = [model(part).logits for part in ids.split([5, 17, 11], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(VARIANTS)),
    cuts=st.sets(st.integers(1, 39), max_size=12),
    pad=st.integers(0, 12),
    reserved=st.sampled_from([0, 5, 40]),
)
@torch.no_grad()
def test_cached_forwards_equal_the_whole(name: str, cuts: set[int], pad: int, reserved: int) -> None:
    model, ids = build(name), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    whole = model(ids, attention_mask=mask).logits
    window = model.config.attn_config.sliding_window_size
    cache, parts, start = KVCache(2, capacity=reserved, window=window if window > 0 else None), [], 0
    for end in [*sorted(cuts), 40]:
        parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits)
        start = end
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["glu", "head_dim", "all"])
def test_flops_against_torchs_counter(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = build(name, attn_impl="eager", sliding_window_size=-1).float(), tokens(2, 40)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(ids)
    assert forward.get_total_flops() == 2 * 40 * forward_flops_per_token(model.config, 40)
    with FlopCounterMode(display=False) as training:
        model(ids, labels=ids).loss.backward()
    assert training.get_total_flops() == 2 * 40 * flops_per_token(model.config, 40)


def test_a_window_is_counted_as_what_it_shows() -> None:
    with_window = build("window").config  # 8 tokens
    assert forward_flops_per_token(with_window, 4096) == forward_flops_per_token(build("grouped-alibi").config, 8) + (
        2.0 * 2 * 2 * (HEADS - 2) * 8 * 48  # its heads of keys and values are fewer
    )
