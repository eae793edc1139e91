"""Rotary positions: exact far out, relative, and not rounded by low precision."""

from typing import Any

import pytest
import torch

from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.model.rotary import rotation


def config(**attn: Any) -> MPTConfig:
    return MPTConfig(
        d_model=64, n_heads=1, n_layers=1, vocab_size=50, max_seq_len=64, attn_config={"rope": True, **attn}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_exact_at_position_70_000(dtype: torch.dtype) -> None:
    """Computed in float32 the largest of these errors is 0.004 (pair 1), and larger further out."""
    at = torch.tensor([0, 1, 69_999, 10_000_019])
    found = rotation(config(), at, dtype)
    exact = at.double()[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    assert found.cos.dtype == found.sin.dtype == torch.float32
    assert (found.cos[0, 0] - exact.cos()).abs().max() < 1e-7
    assert (found.sin[0, 0] - exact.sin()).abs().max() < 1e-7


def test_products_depend_on_the_distance_alone() -> None:
    x = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = []
    for i, j in ((0, 0), (40_000, 40_000), (5, 2), (70_000, 69_997)):
        q, k = (rotation(config(), torch.tensor([at]), x.dtype)(t) for at, t in zip((i, j), x, strict=True))
        products.append((q * k).sum().item())
    assert products[0] == pytest.approx(products[1], abs=1e-9)
    assert products[2] == pytest.approx(products[3], abs=1e-9)
    assert products[0] != pytest.approx(products[2], abs=1e-3)


def test_a_row_turns_as_it_does_alone_whatever_stands_beside_it() -> None:
    """`dynamic` scaling goes by each row's own length."""
    dynamic = config(rope_impl="hf", rope_hf_config={"type": "dynamic", "factor": 4.0})
    rows = torch.stack([torch.arange(100), torch.arange(100).clamp(max=30)])
    both = rotation(dynamic, rows, torch.float64)
    for row, alone in enumerate(rotation(dynamic, positions, torch.float64) for positions in rows):
        assert torch.equal(both.cos[row], alone.cos[0])
    assert torch.equal(both.cos[1, :, :31], rotation(config(), torch.arange(31), torch.float64).cos[0])
    assert not torch.allclose(both.cos[0, :, :31], both.cos[1, :, :31])


def test_a_part_is_what_the_whole_has_there() -> None:
    whole = rotation(config(), torch.arange(20), torch.float32)
    x = torch.randn(3, 2, 20, 64)
    assert torch.equal(whole.part(slice(5, 12))(x[:, :, 5:12]), whole(x)[:, :, 5:12])


def test_autocast_turns_in_float32() -> None:
    torch.manual_seed(0)
    model = MPT(config(attn_impl="eager")).eval()
    seen: list[torch.Tensor] = []
    attn = model.transformer.blocks[0].attn
    attn.register_forward_pre_hook(lambda _, args: seen.append(args[1].rotation.cos))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(torch.arange(40)[None]).logits
    assert seen[0].dtype == torch.float32
    assert (logits.float() - model(torch.arange(40)[None]).logits).abs().max() < 0.1


def test_a_block_compiles_without_graph_breaks() -> None:
    model = MPT(config(attn_impl="eager", qk_gn=True)).eval()
    ids = torch.arange(24)[None]
    expected = model(ids).logits
    for block in model.transformer.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(ids).logits, expected)
