"""Every attention kernel on a GPU against eager attention in float64: values, gradients, masks, windows, memory."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model import alibi
from llmtrain.model.kernels import flash, flex, windows
from llmtrain.model.kernels.blockwise import BLOCKWISE
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.flash import FLASH
from llmtrain.model.kernels.flex import FLEX, FLEX_FLASH
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility
from llmtrain.model.kernels.sdpa import SDPA
from llmtrain.model.kernels.select import select

CUDA = torch.device("cuda")
needs_flash = pytest.mark.skipif(flash.missing() is not None, reason=f"{flash.missing()}")
no_backend = flex.missing(CUDA, "flash") if torch.cuda.is_available() else "needs a CUDA device"
needs_flex_flash = pytest.mark.skipif(no_backend is not None, reason=f"{no_backend}")
KERNELS = [
    pytest.param(SDPA, id="sdpa"),
    pytest.param(BLOCKWISE, id="blockwise"),
    pytest.param(FLEX, id="flex"),
    pytest.param(FLASH, id="flash", marks=needs_flash),
    pytest.param(FLEX_FLASH, id="flex-flash", marks=needs_flex_flash),
]
N = 500
"""No multiple of a block."""


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.empty_cache()


def qkv(
    heads: int, kv_heads: int, n_queries: int, n_keys: int, dtype: torch.dtype, *, head_dim: int = 64, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded to `dtype` already, so that the reference has the same numbers."""
    g = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, n_queries), (kv_heads, n_keys), (kv_heads, n_keys))
    q, k, v = (
        torch.randn(batch, h, n, head_dim, generator=g, device="cuda").to(dtype).requires_grad_() for h, n in sizes
    )
    return q, k, v


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, softcap: Any = None, **who: Any) -> Tensor:
    seen = Visibility(q.shape[2], k.shape[2], CUDA, q.dtype, **who)
    return Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=q.shape[-1] ** -0.5, softcap=softcap)


def with_gradients(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, **how: Any) -> list[Tensor]:
    out = attention(kernel, q, k, v, **how)
    g = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(out.shape, generator=g, device="cuda", dtype=torch.float32).to(out.dtype)
    if rows is not None:
        weights = weights * rows[:, None, :, None]
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    values = out.detach() if rows is None else out.detach() * rows[:, None, :, None]
    return [x.double() for x in (values, *gradients)]


def assert_close(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **how: Any) -> None:
    """No worse than twice eager attention in the same dtype (or the dtype's rounding), against float64."""
    q_wide, k_wide, v_wide = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = with_gradients(EAGER, q_wide, k_wide, v_wide, rows, **how)
    plain = with_gradients(EAGER, q, k, v, rows, **how)
    found = with_gradients(kernel, q, k, v, rows, **how)
    least = 8e-3 if q.dtype == torch.bfloat16 else 2e-5
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), exact, plain, found, strict=True):
        assert z.isfinite().all(), name
        size = x.norm()
        error, allowed = float((z - x).norm() / size), max(2 * float((y - x).norm() / size), least)
        assert error <= allowed, (name, error, allowed)


def left_padding() -> Tensor:
    padding = torch.ones(2, N, dtype=torch.bool, device="cuda")
    padding[1, :150] = False
    return padding


def documents() -> Tensor:
    rows = torch.zeros(2, N, dtype=torch.int64, device="cuda")
    for end in (3, 128, 300):
        rows[0, end:] += 1
    rows[1, 400:] = -1
    return rows


SLOPES = tuple(alibi.slopes(8))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "alibi": {"slopes": SLOPES},
    "alibi-padding": {"slopes": SLOPES, "padding": left_padding},
    "alibi-documents": {"slopes": SLOPES, "documents": documents},
    "documents": {"documents": documents},
    "window": {"window": 100},
    "alibi-window-documents": {"slopes": SLOPES, "window": 100, "documents": documents},
    "softcap": {"softcap": 5.0},
    "alibi-softcap-documents": {"slopes": SLOPES, "softcap": 5.0, "documents": documents},
}


def skip_what_it_cannot(kernel: Kernel, dtype: torch.dtype, how: dict[str, Any]) -> None:
    if kernel is SDPA and "softcap" in how:
        pytest.skip("torch's fused attention has no soft-capping")
    if kernel in (FLASH, FLEX_FLASH) and dtype == torch.float32:
        pytest.skip("takes bfloat16 and float16 only")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(kernel: Kernel, kv_heads: int, case: str, dtype: torch.dtype) -> None:
    skip_what_it_cannot(kernel, dtype, CASES[case])
    how = {key: value() if callable(value) else value for key, value in CASES[case].items()}
    assert_close(kernel, *qkv(8, kv_heads, N, N, dtype), rows=how.get("padding"), **how)


@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dims(kernel: Kernel, head_dim: int) -> None:
    if kernel is FLEX_FLASH and head_dim < 64:
        pytest.skip("not a head_dim of FlashAttention 4")
    assert_close(kernel, *qkv(8, 8, 300, 300, torch.bfloat16, head_dim=head_dim), slopes=SLOPES)


@pytest.mark.parametrize("n_queries", [1, 7, 200])
@pytest.mark.parametrize("kernel", KERNELS[:4])
def test_behind_a_cache(kernel: Kernel, n_queries: int) -> None:
    """Fewer queries than keys: values, as generation needs."""
    with torch.no_grad():
        for n_keys in (N, N + 1, N + 130):
            q, k, v = qkv(8, 2, n_queries, n_keys, torch.bfloat16)
            expected = attention(EAGER, q.double(), k.double(), v.double(), slopes=SLOPES)
            found = attention(kernel, q, k, v, slopes=SLOPES).double()
            assert (found - expected).norm() / expected.norm() < 8e-3


LONG_KERNELS = [*KERNELS[1:]]


@pytest.mark.parametrize("length", [8192, 16384])
@pytest.mark.parametrize("bias_max", [8.0, 16.0])
@pytest.mark.parametrize("kernel", LONG_KERNELS)
def test_alibi_windows_change_nothing(kernel: Kernel, bias_max: float, length: int) -> None:
    """Long rows: values and gradients with and without windows, against the last 256 queries in float64."""
    assert length >= windows.LONG
    slopes = tuple(alibi.slopes(4, bias_max))
    q, k, v = qkv(4, 4, length, length, torch.bfloat16, batch=1)
    found = with_gradients(kernel, q, k, v, None, slopes=slopes)
    everything = with_gradients(kernel, q, k, v, None, slopes=slopes, skip_far_keys=False)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, everything, strict=True):
        assert (x - y).norm() / y.norm() < 4e-3, name  # sums in another order, rounded to bfloat16
    exact = attention(EAGER, q[:, :, -256:].double(), k.double(), v.double(), slopes=slopes)
    errors = [float((x[0][:, :, -256:] - exact).norm() / exact.norm()) for x in (found, everything)]
    assert errors[0] < max(1.1 * errors[1], 3e-3), errors


def test_windows_in_float32_lose_nothing() -> None:
    """In float32 as well, where 2^-25 of the sum is what cannot be seen."""
    slopes = tuple(alibi.slopes(4))
    q, k, v = (x.detach() for x in qkv(4, 4, 8192, 8192, torch.float32, batch=1))
    some = attention(FLEX, q, k, v, slopes=slopes)
    everything = attention(FLEX, q, k, v, slopes=slopes, skip_far_keys=False)
    assert (some - everything).abs().max() < 2e-6 * everything.abs().max()


def test_windows_skip_blocks() -> None:
    """And something is skipped: the lists that the kernel gets are short where slopes are steep."""
    slopes = tuple(alibi.slopes(8))
    q, k, _ = (x.detach() for x in qkv(8, 8, 16384, 16384, torch.bfloat16, batch=1))
    mask = flex.FlexMask(Visibility(16384, 16384, CUDA, q.dtype, slopes=slopes))
    assert mask.slopes is not None
    assert mask.margin is not None
    lists = flex._call(
        flex._window_lists, q, k, *mask.kinds, mask.slopes, mask.margin, str(mask.block), str(1 / 8), None
    )
    kept = (lists.kv_num_blocks + lists.full_kv_num_blocks).sum(-1)[0].float()
    blocks = 16384 // mask.block
    share = kept / (blocks * (blocks + 1) / 2)
    assert share[0] < 0.1, share
    assert share.mean() < 0.7, share


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kernel", LONG_KERNELS[:3])
def test_memory_is_linear(kernel: Kernel, training: bool) -> None:
    """32,768 tokens: what attention needs besides q, k and v is a small multiple of them, and no T x T tensor."""
    slopes = tuple(alibi.slopes(8))
    q, k, v = qkv(8, 8, 32768, 32768, torch.bfloat16, batch=1)
    for _ in range(2):  # the first time it may try out tilings
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(training):
            out = attention(kernel, q, k, v, slopes=slopes)
        if training:
            torch.autograd.grad(out.sum(), (q, k, v))
        peak = torch.cuda.max_memory_allocated() - before
        del out
    one = q.numel() * 4  # in float32
    assert peak < 16 * one, (peak / one, "times q in float32; all scores are", 32768 * 8 * 2 / 64)


def test_65k_with_wide_blocks() -> None:
    slopes = tuple(alibi.slopes(2, 16.0))
    q, k, v = qkv(2, 2, flex.WIDE, flex.WIDE, torch.bfloat16, batch=1)
    found = with_gradients(FLEX, q, k, v, None, slopes=slopes)[0]
    exact = attention(EAGER, q[:, :, -64:].double(), k.double(), v.double(), slopes=slopes)
    assert (found[:, :, -64:] - exact).norm() / exact.norm() < 4e-3


@needs_flash
def test_flash_refuses_documents_in_pieces() -> None:
    from llmtrain.errors import UserError

    rows = torch.tensor([[0, 1, 0]], device="cuda")
    with pytest.raises(UserError, match="one piece"):
        FLASH.prepare(Visibility(3, 3, CUDA, torch.bfloat16, documents=rows))


def test_auto() -> None:
    def seen(n_queries: int, n_keys: int, dtype: torch.dtype = torch.bfloat16, slopes: Any = SLOPES) -> Visibility:
        return Visibility(n_queries, n_keys, CUDA, dtype, slopes=slopes)

    assert select("auto", seen(2048, 2048)).kernel.name == "flex"
    assert select("auto", seen(65536, 65536, torch.float32)).kernel.name == "flex"
    assert select("auto", seen(2048, 2048, slopes=None)).kernel.name == "sdpa"
    assert select("auto", seen(1, 70_000)).kernel.name == "sdpa"
    assert select("auto", seen(64, 64)).kernel.name == "sdpa"
    assert select("auto", seen(2048, 2048), dropout=True).kernel.name == "sdpa"
    assert math.isfinite(sum(SLOPES))
