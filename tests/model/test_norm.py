"""The norms against their formulas, and what autocast does to each."""

import pytest
import torch

from llmtrain.model.norm import build_norm

NAMES = ["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    norm = build_norm(name, 24, eps=1e-3, bias=bias).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    x = 0.1 * torch.randn(3, 5, 24, dtype=torch.float64) + 0.2
    if "rms" in name:
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
        assert len(list(norm.parameters())) == 1
    else:
        expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt() * norm.weight
        assert len(list(norm.parameters())) == 1 + bias
        if bias:
            expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_precision_under_autocast(name: str) -> None:
    norm, x = build_norm(name, 24, eps=1e-5, bias=True), torch.randn(4, 24)
    exact = norm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
        from_low = norm(x.bfloat16())
    low = name.startswith("low")
    assert out.dtype == (torch.bfloat16 if low else torch.float32)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.04 if low else 0)
    torch.testing.assert_close(from_low.float(), exact, rtol=0, atol=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_model(name: str) -> None:
    norm, x = build_norm(name, 24, eps=1e-5, bias=True).bfloat16(), torch.randn(4, 24).bfloat16()
    assert norm(x).dtype == torch.bfloat16


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown"):
        build_norm("batchnorm", 8, eps=1e-5, bias=False)
