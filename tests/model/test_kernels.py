"""Every kernel is the eager one in float64 and float32: values and gradients, through the model and alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model import alibi
from llmtrain.model.config import MPTConfig
from llmtrain.model.kernels import pieces
from llmtrain.model.kernels.dense import LONGEST, dense_bias
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility
from llmtrain.model.kernels.segments import segments
from llmtrain.model.kernels.select import select
from llmtrain.model.mpt import MPT

CPU = torch.device("cpu")
PLAIN = Visibility(8, 8, CPU, torch.float32)
EAGER, SDPA, BLOCKWISE = (select(name, PLAIN).kernel for name in ("eager", "sdpa", "blockwise"))


def model(attn_impl: str, dtype: torch.dtype, n_heads: int, **attn: Any) -> MPT:
    torch.manual_seed(1)
    config = MPTConfig(
        d_model=8 * n_heads,
        n_heads=n_heads,
        n_layers=2,
        vocab_size=64,
        max_seq_len=300,
        attn_config={"attn_impl": attn_impl, **attn},
        norm_type="low_precision_rmsnorm" if n_heads == 5 else "low_precision_layernorm",
    )
    return MPT(config).to(dtype)


def run(m: MPT, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    logits = m(ids, attention_mask=mask).logits
    assert logits is not None
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights.to(logits.dtype))[real].sum().backward()
    return logits.detach()[real], {name: p.grad for name, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("length", "padded"), [(1, False), (33, True), (100, False), (300, True)])
@pytest.mark.parametrize(
    ("n_heads", "attn"),
    [
        (1, {"alibi": True}),
        (5, {"alibi": True, "alibi_bias_max": 16}),
        (8, {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 0.4}),
        (12, {"alibi": True, "qk_ln": True}),
        (12, {"alibi": False}),
        (5, {"alibi": False, "qk_ln": True, "clip_qkv": 0.4, "softmax_scale": 0.2}),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_models_are_eager(n_heads: int, attn: dict[str, Any], length: int, padded: bool, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, : length // 3] = 0
    expected, expected_grads = run(model("eager", torch.float64, n_heads, **attn), ids, mask)
    impl = "sdpa" if length == 100 else "blockwise"
    actual, grads = run(model(impl, dtype, n_heads, **attn), ids, mask)
    atol = 1e-11 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(actual.double(), expected, rtol=atol, atol=atol)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(
            grad.double(), expected_grads[name], rtol=0, atol=atol * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}"
        )


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, **who: Any) -> Tensor:
    seen = Visibility(q.shape[2], k.shape[2], CPU, q.dtype, **who)
    return Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=q.shape[-1] ** -0.5, dropout_p=0.0)


def qkv(length: int, n_keys: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    sizes = (length, n_keys or length, n_keys or length)
    return [torch.randn(2, 5, n, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in sizes]


@pytest.mark.parametrize("kernel", [EAGER, SDPA, BLOCKWISE], ids=lambda k: k.name)
@pytest.mark.parametrize("slopes", [None, tuple(alibi.slopes(5))], ids=["plain", "alibi"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("n_queries", [1, 3, 24])
def test_against_a_loop(kernel: Kernel, slopes: tuple[float, ...] | None, padded: bool, n_queries: int) -> None:
    """The definition, one query at a time: also with fewer queries than keys, as with a cache."""
    n_keys = 24
    q, k, v = qkv(n_queries, n_keys)
    padding = torch.ones(2, n_keys, dtype=torch.bool)
    if padded:
        padding[1, :7] = False
    actual = attention(kernel, q, k, v, slopes=slopes, padding=padding if padded else None)
    for b in range(2):
        for h in range(5):
            for row in range(n_queries):
                i = n_keys - n_queries + row
                seen = [j for j in range(i + 1) if padding[b, j] or j == i]
                scores = torch.stack(
                    [q[b, h, row] @ k[b, h, j] / 4 + (slopes[h] if slopes else 0) * (j - i) for j in seen]
                )
                torch.testing.assert_close(actual[b, h, row], scores.softmax(0) @ v[b, h, seen])


@pytest.mark.parametrize("slopes", [None, tuple(alibi.slopes(5))], ids=["plain", "alibi"])
@pytest.mark.parametrize(
    ("lengths", "apart"),
    [([40, 24], True), ([64], True), ([2] * 32, False), ([20, 20, -20, 4], False)],
    ids=["two", "one", "many-short", "one-in-two-places"],
)
def test_documents_one_by_one_are_the_dense_bias(
    slopes: tuple[float, ...] | None, lengths: list[int], apart: bool
) -> None:
    """sdpa takes long documents one by one, and falls back where that is slower or another function."""
    row = [0 if length < 0 else number for number, length in enumerate(lengths) for _ in range(abs(length))]
    documents = torch.tensor([row, [9] * 64])
    q, k, v = qkv(64)
    assert (segments(Visibility(64, 64, CPU, q.dtype, slopes=slopes, documents=documents)) is not None) == apart
    results = []
    for kernel in (EAGER, SDPA):
        out = attention(kernel, q, k, v, slopes=slopes, documents=documents)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kernel", [EAGER, SDPA, BLOCKWISE], ids=lambda k: k.name)
def test_documents_cannot_see_each_other(kernel: Kernel) -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [7, 7, 7, 7, 7, 7, 7, 7]])
    q, k, v = qkv(8)
    slopes = tuple(alibi.slopes(5))
    together = attention(kernel, q, k, v, slopes=slopes, documents=documents)
    for first, last in [(0, 3), (3, 7), (7, 8)]:
        alone = attention(kernel, *(t[:1, :, first:last] for t in (q, k, v)), slopes=slopes)
        torch.testing.assert_close(together[:1, :, first:last], alone)
    torch.testing.assert_close(together[1:], attention(kernel, q[1:], k[1:], v[1:], slopes=slopes))


@pytest.mark.parametrize("kernel", [EAGER, SDPA, BLOCKWISE], ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("slopes", [None, tuple(alibi.slopes(5))], ids=["plain", "alibi"])
def test_rows_of_padding_alone_stay_finite(
    kernel: Kernel, slopes: tuple[float, ...] | None, dtype: torch.dtype
) -> None:
    """More padding than a fused kernel's block of keys (512), one row nothing else: no NaN, nor in the gradients."""
    padding = torch.ones(2, 1100, dtype=torch.bool)
    padding[0, :1050] = False
    padding[1] = False
    q, k, v = qkv(1100, dtype=dtype)
    out = attention(kernel, q, k, v, slopes=slopes, padding=padding)
    assert out.isfinite().all()
    out.sum().backward()
    for t in (q, k, v):
        assert t.grad is not None
        assert t.grad.isfinite().all()
    exact = attention(EAGER, q.double(), k.double(), v.double(), slopes=slopes, padding=padding)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("kernel", [EAGER, SDPA, BLOCKWISE], ids=lambda k: k.name)
def test_autocast_does_not_round_the_bias(kernel: Kernel) -> None:
    """torch's autocast rounds SDPA's mask to bfloat16, where 1027 becomes 1024: here that is e^0 instead of e^-3."""
    n, far = 1100, 1027
    q, k, v = (torch.zeros(1, 1, n, 16, dtype=torch.bfloat16) for _ in range(3))
    q[..., 0] = 4
    k[..., n - 1 - far, 0] = 1024  # a score of 4 * 1024 / sqrt(16) = 1024, all other scores are 0
    v[..., n - 1 - far, :] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(kernel, q, k, v, slopes=(1.0,))
    assert out.dtype == torch.bfloat16
    expected = math.exp(-3) / (math.exp(-3) + 1 / (1 - math.exp(-1)))
    assert out[0, 0, -1, 0].item() == pytest.approx(expected, rel=2**-7)


def test_the_probe_does_not_depend_on_its_surroundings() -> None:
    """Asked for the first time under autocast, it compares in float32 all the same."""
    pieces.flash_on_cpu.cache_clear()
    outside = pieces.flash_on_cpu()
    pieces.flash_on_cpu.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert pieces.flash_on_cpu() == outside


def test_bias_holds_the_distances() -> None:
    bias = dense_bias(Visibility(3, 5, CPU, torch.bfloat16, slopes=(0.5, 0.25)))
    assert bias.shape == (1, 2, 3, 5)
    assert bias.dtype == torch.float32
    assert bias[0, 0, 0, :3].tolist() == [-1.0, -0.5, 0.0]
    assert bias[0, 1, 2].tolist() == [-1.0, -0.75, -0.5, -0.25, 0.0]
    assert (bias[0, :, 0, 3:] < -1e30).all()
    assert bias.isfinite().all()


def test_too_long_for_a_dense_bias() -> None:
    with pytest.raises(UserError, match=f"max_seq_len to {LONGEST}"):
        dense_bias(Visibility(LONGEST + 1, LONGEST + 1, CPU, torch.float32, slopes=(0.5,)))
    assert dense_bias(Visibility(1, 70_000, CPU, torch.float32, slopes=(0.5,))).shape == (1, 1, 1, 70_000)


def test_plain_attention_needs_no_bias() -> None:
    assert not isinstance(SDPA.prepare(Visibility(70_000, 70_000, CPU, torch.float32)), Tensor)
    assert SDPA.prepare(Visibility(1, 70_000, CPU, torch.float32)) is None


def test_select() -> None:
    assert "auto" in select("auto", PLAIN).reason
    assert select("eager", PLAIN).kernel.name == "eager"
    for legacy in ("torch", "triton"):
        assert select(legacy, PLAIN).kernel.name == "sdpa"
        assert legacy in select(legacy, PLAIN).reason
    with pytest.raises(UserError, match="unknown"):
        select("flsh", PLAIN)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "blockwise"),
        ({"softcap": True}, "blockwise"),
        ({"dropout": True}, "sdpa"),
        ({"softcap": True, "dropout": True}, "eager"),
    ],
)
def test_auto_on_a_cpu(options: dict[str, bool], kernel: str) -> None:
    choice = select("auto", PLAIN, **options)  # type: ignore[arg-type]
    assert choice.kernel.name == kernel
    assert f"auto -> {kernel}: " in choice.reason
    assert len(choice.reason.splitlines()) == 1


def test_auto_for_one_query_on_a_cpu() -> None:
    one = Visibility(1, 40, torch.device("cpu"), torch.float32, slopes=(0.5, 0.25))
    assert select("auto", one).kernel.name == "sdpa"
    assert select("auto", one, softcap=True).kernel.name == "blockwise"


@pytest.mark.parametrize("kv_heads", [8, 4, 1])
@pytest.mark.parametrize("biased", ["", "alibi", "padding", "alibi padding window"])
def test_one_query_over_shared_keys(kv_heads: int, biased: str) -> None:
    """sdpa, which reads keys without copying them for each query's head."""
    padding = torch.ones(3, 50, dtype=torch.bool)
    padding[1, :20] = False
    seen = Visibility(
        1,
        50,
        torch.device("cpu"),
        torch.float64,
        slopes=tuple(alibi.slopes(8, 8)) if "alibi" in biased else None,
        padding=padding if "padding" in biased else None,
        window=30 if "window" in biased else None,
    )
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 8, 1, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, kv_heads, 50, 16, generator=generator, dtype=torch.float64)
    found, expected = (Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=0.25) for kernel in (SDPA, EAGER))
    assert (found - expected).abs().max() < 1e-12


def test_what_a_kernel_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="soft-capping"):
        select("sdpa", PLAIN, softcap=True)
    with pytest.raises(UserError, match="blockwise has no dropout"):
        select("blockwise", PLAIN, dropout=True)


def test_dropout_with_one_row_of_alibi() -> None:
    """The private kernel has no dropout: sdpa then takes the dense bias."""
    q, k, v = qkv(40, dtype=torch.float32)
    attend = Attention(SDPA, SDPA.prepare(Visibility(40, 40, CPU, q.dtype, slopes=tuple(alibi.slopes(5)))))
    kept = attend(q, k, v, softmax_scale=0.25)
    torch.testing.assert_close(attend(q, k, v, softmax_scale=0.25, dropout_p=1e-9), kept)
    assert (attend(q, k, v, softmax_scale=0.25, dropout_p=0.9) - kept).abs().max() > 0.1


@pytest.mark.parametrize("bias_max", [8, 16])
@pytest.mark.parametrize("n_heads", [1, 2, 5, 8, 12, 64])
def test_slopes(n_heads: int, bias_max: int) -> None:
    slopes = alibi.slopes(n_heads, bias_max)
    assert len(slopes) == len(set(slopes)) == n_heads
    assert all(0 < s < 1 for s in slopes)
    n = 2 ** math.ceil(math.log2(n_heads))
    everything = {2.0 ** (-bias_max * i / n) for i in range(1, n + 1)}
    assert set(slopes) <= everything
    if n == n_heads:
        assert slopes == sorted(everything, reverse=True)
    if n_heads == 12:
        assert [round(-math.log2(s) * 16 / bias_max) for s in slopes] == [2, 4, 6, 8, 10, 12, 14, 16, 1, 3, 5, 7]
