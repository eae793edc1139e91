"""flash-attn without flash-attn: what is passed to it, against a stand-in that computes what its documentation says.

The stand-in has the signatures of flash-attn 2.8 and is plain torch. Layouts, sequences, windows and slopes are shown
right here; that the real package computes this, only tests/gpu shows.
"""

import math
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model import alibi
from llmtrain.model.kernels import flash, flex
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.flash import FLASH, FlashMask, head_groups
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility
from llmtrain.model.kernels.select import select

CPU = torch.device("cpu")
CALLS: list[dict[str, Any]] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """(batch, T, heads, head_dim); causality, windows and ALiBi aligned to the bottom right corner."""
    CALLS.append(
        {"heads": q.shape[2], "window_size": window_size, "dropout_p": dropout_p, "deterministic": deterministic}
    )
    assert causal
    assert not return_attn_probs
    assert q.shape[2] % k.shape[2] == 0
    heads = torch.arange(q.shape[2]) // (q.shape[2] // k.shape[2])
    scores = torch.einsum("bihd,bjhd->bhij", q, k[:, :, heads]) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1])
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        assert alibi_slopes.shape == (q.shape[2],)
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * (i - j).abs()
    hidden = j > i
    if window_size[0] >= 0:
        hidden = hidden | (j < i - window_size[0])
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhij,bjhd->bihd", weights, v[:, :, heads])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """(tokens, heads, head_dim): sequence s has queries cu_seqlens_q[s] to cu_seqlens_q[s + 1], and keys likewise."""
    assert block_table is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert cu_seqlens_k[-1] == len(k)
    assert cu_seqlens_q.diff().max() <= max_seqlen_q
    assert cu_seqlens_k.diff().max() <= max_seqlen_k
    queries, keys, values = (
        torch.split(x, ends.diff().tolist()) for x, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    how = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    parts = zip(queries, keys, values, strict=True)
    return torch.cat([flash_attn_func(q_s[None], k_s[None], v_s[None], *how)[0] for q_s, k_s, v_s in parts])


def pretend(monkeypatch: pytest.MonkeyPatch, version: str = "2.8.3") -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "version", lambda _: version)
    flash._functions.cache_clear()
    CALLS.clear()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its float64 is let through, so that differences are seen."""
    pretend(monkeypatch)
    monkeypatch.setattr(flash, "LOW_PRECISION", (*flash.LOW_PRECISION, torch.float64))
    yield
    flash._functions.cache_clear()


def qkv(heads: int, kv_heads: int, n_queries: int, n_keys: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n_queries)
    shapes = ((2, heads, n_queries, 8), (2, kv_heads, n_keys, 8), (2, kv_heads, n_keys, 8))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return (size * q).requires_grad_(), (size * k).requires_grad_(), v.requires_grad_()


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, softcap: Any = None, **who: Any) -> Tensor:
    seen = Visibility(q.shape[2], k.shape[2], CPU, q.dtype, **who)
    return Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=0.3, softcap=softcap)


def assert_same(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, atol: float = 1e-11, **who: Any) -> None:
    """Values and gradients are eager's, at the queries that `rows` (batch, n_queries) marks."""
    results = []
    for kernel in (EAGER, FLASH):
        out = attention(kernel, q, k, v, **who)
        assert out.shape == q.shape
        out = out if rows is None else out.transpose(1, 2)[rows]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


SLOPES = tuple(alibi.slopes(6))


@pytest.mark.parametrize("n_queries", [33, 1, 7])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("who", [{}, {"slopes": SLOPES}, {"slopes": SLOPES, "window": 9, "softcap": 2.0}], ids=str)
def test_whole_rows(n_queries: int, kv_heads: int, who: dict[str, Any]) -> None:
    assert_same(*qkv(6, kv_heads, n_queries, 33), **who)
    (call,) = CALLS
    window_size = (who["window"], 0) if "window" in who else (-1, -1)
    assert call == {"heads": 6, "window_size": window_size, "dropout_p": 0.0, "deterministic": False}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_documents(data: st.DataObject) -> None:
    """Packed rows of any documents, with padding (-1) behind them."""
    n = data.draw(st.integers(1, 20), "T")
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * n, max_size=2 * n), "starts")).view(2, n)
    documents = starts.cumsum(1)
    documents[1, n - data.draw(st.integers(0, n // 2), "padding") :] = -1
    assert_same(*qkv(6, 2, n, n), slopes=SLOPES, documents=documents)


@pytest.mark.parametrize("n_queries", [20, 1, 5])
@pytest.mark.parametrize("left", [0, 3, 17, 20])
def test_left_padding(left: int, n_queries: int) -> None:
    """Prompts of different lengths, and what is generated behind them: real tokens see what eager lets them see."""
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :left] = False
    rows = padding[:, 20 - n_queries :]
    assert_same(*qkv(6, 2, n_queries, 20), rows=rows, slopes=SLOPES, padding=padding)
    out = attention(FLASH, *qkv(6, 2, n_queries, 20), slopes=SLOPES, padding=padding)
    assert out.isfinite().all()


def test_padding_and_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2]]).expand(2, -1)
    padding = torch.ones(2, 10, dtype=torch.bool)
    padding[0, :2] = False
    assert_same(*qkv(6, 2, 10, 10), rows=padding, slopes=SLOPES, documents=documents, padding=padding)


@pytest.mark.parametrize("key", ["documents", "padding"])
def test_pieces_are_refused(key: str) -> None:
    row = torch.tensor([[0, 1, 0, 0]]) if key == "documents" else torch.tensor([[True, False, True, True]])
    who: dict[str, Any] = {key: row}
    with pytest.raises(UserError, match="in one piece"):
        FlashMask(Visibility(4, 4, CPU, torch.bfloat16, **who))


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (8, 8), (12, 4), (5, 1)])
@pytest.mark.parametrize("documents", [False, True])
def test_windows_change_nothing(heads: int, kv_heads: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in groups, in an order of their own: what comes out is where it was, and lacks less than 2^-24."""
    monkeypatch.setattr(flash, "LONG", 256)
    slopes = tuple(16 * s for s in alibi.slopes(heads, 16))
    q, k, v = qkv(heads, kv_heads, 256, 256, size=0.3)
    who: dict[str, Any] = {"slopes": slopes}
    if documents:
        who["documents"] = (torch.arange(256) >= 40).long().expand(2, -1)
    assert_same(q, k, v, atol=2**-24 * 8, **who)
    widths = {call["window_size"] for call in CALLS}
    if kv_heads > 1:
        assert 1 < len(widths) <= flash.MAX_GROUPS
        CALLS.clear()
        assert_same(q, k, v, skip_far_keys=False, **who)
        assert {call["window_size"] for call in CALLS} == {(-1, -1)}


@settings(max_examples=50, deadline=None)
@example(needed=[0.0, 2.0, 64.0, math.inf, 1.0], per=1, window=100)  # five widths, but four within the window
@given(
    needed=st.lists(st.floats(-10, 5000) | st.just(math.inf), min_size=1, max_size=12),
    per=st.sampled_from([1, 2]),
    window=st.sampled_from([-1, 100]),
)
def test_groups(needed: list[float], per: int, window: int) -> None:
    """Every key-value head is in one group, whose window is wide enough for all its query heads and no wider."""
    kv_heads = len(needed)
    of_queries = [x - extra for x in needed for extra in range(per)]
    groups = head_groups(of_queries, kv_heads, 2048, window)
    assert sorted(head for _, heads in groups for head in heads) == list(range(kv_heads))
    assert len(groups) <= flash.MAX_GROUPS
    for width, heads in groups:
        assert (width < 0) == (window < 0 and max(needed[head] for head in heads) >= 1024)
        for head in heads:
            assert width < 0 or width == window or width >= needed[head]
        if len(groups) < flash.MAX_GROUPS and 0 <= width != window:
            assert width <= max(1, 2 * min(max(needed[head], 0.5) for head in heads))


def test_dropout_is_passed_on() -> None:
    q, k, v = qkv(6, 2, 4, 4)
    mask = FLASH.prepare(Visibility(4, 4, CPU, q.dtype))
    FLASH.attend(q, k, v, mask, softmax_scale=0.3, dropout_p=0.25, softcap=None)
    assert CALLS[-1]["dropout_p"] == 0.25
    with pytest.raises(UserError, match="soft-capping"):
        FLASH.attend(q, k, v, mask, softmax_scale=0.3, dropout_p=0.25, softcap=2.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_backward_pass_is_deterministic_where_torch_is(wanted: bool, packed: bool) -> None:
    q, k, v = qkv(6, 2, 4, 4)
    documents = torch.zeros(len(q), 4, dtype=torch.int64) if packed else None
    mask = FLASH.prepare(Visibility(4, 4, CPU, q.dtype, documents=documents))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(wanted)
        FLASH.attend(q, k, v, mask, softmax_scale=0.3, dropout_p=0.0, softcap=None)
    finally:
        torch.use_deterministic_algorithms(before)
    assert CALLS[-1]["deterministic"] is wanted


def test_float32_is_refused() -> None:
    with pytest.raises(UserError, match=r"float32; set precision to amp_bf16"):
        FLASH.prepare(Visibility(4, 4, CPU, torch.float32))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash.missing() is None
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._functions.cache_clear()
    assert "pip install flash-attn --no-build-isolation" in str(flash.missing())
    with pytest.raises(UserError, match="pip install"):
        FLASH.prepare(Visibility(4, 4, CPU, torch.bfloat16))


@pytest.mark.parametrize("version", ["2.5.9.post1", "1.0.9"])
def test_old_package(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, version)
    assert version in str(flash.missing())


def test_versions_compare_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "2.10.0.post1")
    assert flash.missing() is None


def test_select(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Visibility(8, 8, torch.device("cuda"), torch.bfloat16)
    assert select("flash", seen).kernel is FLASH
    with pytest.raises(UserError, match="CUDA"):
        select("flash", Visibility(8, 8, CPU, torch.bfloat16))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    flash._functions.cache_clear()
    with pytest.raises(UserError, match="pip install flash-attn"):
        select("flash", seen)


@pytest.mark.parametrize(
    ("triton", "dropout", "who", "name"),
    [
        (True, False, {}, "flex"),
        (True, True, {}, "flash"),
        (True, True, {"slopes": None}, "sdpa"),
        (True, True, {"padding": torch.ones(1, 2048, dtype=torch.bool)}, "sdpa"),
        (False, False, {}, "flash"),
        (False, False, {"documents": torch.zeros(1, 2048, dtype=torch.int64)}, "flash"),
        (False, False, {"dtype": torch.float32}, "sdpa"),
        (False, False, {"n_queries": 1}, "sdpa"),
    ],
)
def test_auto_takes_it_where_flex_cannot_be(
    triton: bool, dropout: bool, who: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    shape = {"n_queries": 2048, "n_keys": 2048, "device": torch.device("cuda"), "dtype": torch.bfloat16}
    seen = Visibility(**{**shape, "slopes": (0.5,), **who})
    choice = select("auto", seen, dropout=dropout)
    assert choice.kernel.name == name, choice.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))  # Turing
    assert select("auto", seen, dropout=dropout).kernel is not FLASH
