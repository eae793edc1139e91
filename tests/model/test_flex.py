"""FlexAttention: values against eager, block masks against the pairs that they stand for. Gradients: tests/gpu."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.errors import UserError
from llmtrain.model import alibi
from llmtrain.model.kernels import flex, windows
from llmtrain.model.kernels.alibi_window import negligible
from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.flex import FLEX, FlexMask, static_blocks
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility
from llmtrain.model.kernels.select import select

CPU = torch.device("cpu")


def qkv(
    heads: int, kv_heads: int, n_queries: int, n_keys: int, dtype: torch.dtype = torch.float64, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n_queries)
    shapes = ((2, heads, n_queries, 8), (2, kv_heads, n_keys, 8), (2, kv_heads, n_keys, 8))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return (size * q).to(dtype), (size * k).to(dtype), v.to(dtype)


def attention(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, softcap: Any = None, **who: Any) -> Tensor:
    seen = Visibility(q.shape[2], k.shape[2], CPU, q.dtype, **who)
    return Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=0.3, softcap=softcap)


def left_padding(n: int) -> Tensor:
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[1, : n // 3] = False
    return padding


def documents(n: int, *ends: int) -> Tensor:
    """Row 0 in parts, row 1 one document with padding behind it."""
    rows = torch.zeros(2, n, dtype=torch.int64)
    for end in ends:
        rows[0, end:] += 1
    rows[1, n - 20 :] = -1
    return rows


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padding": {"padding": left_padding(300)},
    "documents": {"documents": documents(300, 3, 130, 260)},
    "both": {"documents": documents(300, 3, 130, 260), "padding": left_padding(300)},
    "window": {"window": 70},
    "window-documents": {"window": 70, "documents": documents(300, 131)},
}


@pytest.mark.parametrize(
    ("mask", "n_queries", "slopes", "softcap"),
    [
        ("causal", 300, True, None),
        ("causal", 300, False, None),
        ("causal", 1, True, None),
        ("padding", 300, True, 3.0),
        ("padding", 140, True, 3.0),
        ("documents", 300, False, 3.0),
        ("both", 140, True, None),
        ("window-documents", 300, True, None),
        ("window", 140, False, None),
    ],
)
def test_flex_is_eager(mask: str, n_queries: int, slopes: bool, softcap: float | None) -> None:
    who = {"slopes": tuple(alibi.slopes(6)) if slopes else None, **MASKS[mask]}
    q, k, v = qkv(6, 2, n_queries, 300)
    expected = attention(EAGER, q, k, v, softcap, **who)
    torch.testing.assert_close(attention(FLEX, q, k, v, softcap, **who), expected, rtol=0, atol=1e-12)


def test_float32_is_eager() -> None:
    who: dict[str, Any] = {"slopes": tuple(alibi.slopes(6)), **MASKS["both"]}
    q, k, v = qkv(6, 2, 300, 300)
    found = attention(FLEX, q.float(), k.float(), v.float(), **who)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attention(EAGER, q, k, v, **who), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.long
def test_inductors_kernel_reads_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by inductor, FlexAttention computes listed blocks only, on the CPU as well (forward)."""
    monkeypatch.setattr(flex, "LONG", 512)
    monkeypatch.setattr(flex, "_compiled", lambda function, _: torch.compile(function, fullgraph=True))
    q, k, v = (x.float() for x in qkv(4, 2, 700, 700))
    slopes = (1.0, 0.5, 0.05, 0.01)
    expected = attention(EAGER, q.double(), k.double(), v.double(), slopes=slopes)
    torch.testing.assert_close(attention(FLEX, q, k, v, slopes=slopes).double(), expected, rtol=0, atol=2e-6)
    v[:, :, :128] = 1e30  # no query of the last block may look at it, where heads are steep
    found = attention(FLEX, q, k, v, slopes=slopes)
    assert found[:, 0, 640:].abs().max() < 10
    assert found[:, 3, 640:].abs().max() > 1e20


def pairs(seen: Visibility) -> Tensor:
    """Who sees whom, by the dense bias that eager adds: (batch, n_queries, n_keys) bool."""
    return dense_bias(seen)[:, 0] > -1e30


def spread(blocks: Tensor, size: int, n_queries: int, n_keys: int) -> Tensor:
    """Blocks as pairs."""
    return blocks.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :n_queries, :n_keys]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_are_what_the_pairs_say(data: st.DataObject) -> None:
    """Pairs that see each other lie in listed blocks, and plain blocks hold no others; whatever the mask."""
    n = data.draw(st.integers(1, 40), "n_keys")
    n_queries = data.draw(st.one_of(st.just(n), st.integers(1, n)), "n_queries")
    who: dict[str, Any] = {}
    if data.draw(st.booleans(), "padded"):
        real = data.draw(st.lists(st.booleans(), min_size=2 * n, max_size=2 * n), "padding")
        who["padding"] = torch.tensor(real).view(2, n)
    if data.draw(st.booleans(), "has documents"):
        numbers = data.draw(st.lists(st.integers(-1, 3), min_size=2 * n, max_size=2 * n), "documents")
        rows = torch.tensor(numbers).view(2, n)
        who["documents"] = rows.sort(1).values if data.draw(st.booleans(), "in order") else rows
    if data.draw(st.booleans(), "windowed"):
        who["window"] = data.draw(st.integers(0, n), "window")
    seen = Visibility(n_queries, n, CPU, torch.float32, **who)
    expected = pairs(seen)
    size = 8
    offset = torch.tensor(n - n_queries, dtype=torch.int32) if n != n_queries else None
    mod = create_mask(flex.mask_mod(seen, offset), 2, 1, n_queries, n, "cpu")[:, 0]
    assert (mod == expected).all()
    some, every = (spread(blocks, size, n_queries, n)[:, 0] for blocks in static_blocks(seen, size))
    assert (expected <= some).all()
    assert (every <= expected).all()
    assert (every <= some).all()


def test_few_blocks_are_listed() -> None:
    """Not only right but sparse: the blocks of four equal documents, and of a sliding window."""
    rows = torch.arange(1024)[None] // 256
    some, every = static_blocks(Visibility(1024, 1024, CPU, torch.float32, documents=rows), 128)
    assert some.sum() == 4 * 3
    assert every.sum() == 4 * 1
    some, every = static_blocks(Visibility(1024, 1024, CPU, torch.float32, window=200), 128)
    assert some.sum() == 8 + 7 + 6
    assert every.sum() == 0
    some, every = static_blocks(Visibility(1024, 1024, CPU, torch.float32), 128)
    assert some.sum() == 36
    assert every.sum() == 28


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_lists_are_torchs(rows: int, columns: int, seed: int) -> None:
    """As BlockMask.from_kv_blocks makes them from sorted lists, and turned around for the backward pass."""
    g = torch.Generator().manual_seed(seed)
    some = torch.rand(2, 3, rows, columns, generator=g) < 0.6
    every = some & (torch.rand(some.shape, generator=g) < 0.5)
    lists = flex._lists(some, every)
    partial = (some & ~every).int()
    torch.testing.assert_close(lists.kv_num_blocks, partial.sum(-1).int())
    torch.testing.assert_close(lists.kv_indices, torch.argsort(partial, dim=-1, descending=True, stable=True).int())
    torch.testing.assert_close(
        lists.full_kv_indices, torch.argsort(every.int(), dim=-1, descending=True, stable=True).int()
    )
    theirs = BlockMask.from_kv_blocks(*lists[:4], BLOCK_SIZE=4, seq_lengths=(4 * rows, 4 * columns))
    for name, ours in zip(lists._fields, lists, strict=True):
        found = getattr(theirs, name)
        assert ours.dtype == torch.int32
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, found, msg=name)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_windows_lose_less_than_float32_has_bits(data: st.DataObject) -> None:
    """Whatever q and k are, the dropped blocks hold less than 2^-25 of each row's softmax sum: measured in float64."""
    n, size = 96, 8
    heads, kv_heads = data.draw(st.sampled_from([(4, 4), (4, 2), (6, 1)]), "heads")
    n_queries = data.draw(st.sampled_from([n, 40]), "n_queries")
    softcap = data.draw(st.sampled_from([None, 2.0]), "softcap")
    scale_of_q = data.draw(st.sampled_from([0.05, 1.0, 8.0]), "size of q and k")
    steepness = data.draw(st.sampled_from([0.5, 2.0, 20.0]), "steepness")
    q, k, _ = qkv(heads, kv_heads, n_queries, n, size=scale_of_q)
    q[:, :, n_queries // 2] *= data.draw(st.sampled_from([0.0, -1.0, 5.0]), "an odd query")
    slopes = steepness * torch.tensor(alibi.slopes(heads), dtype=torch.float64)
    k = k + data.draw(st.sampled_from([0.0, 3.0]), "what all keys share")
    bounds = windows.measure(q, k, 0.3, size, softcap=softcap)
    kept = windows.kept_blocks(bounds, slopes, size, n - n_queries, negligible(torch.float32, n), softcap)
    assert kept.shape == (2, heads, n_queries // size, n // size)
    scores = (q @ k.repeat_interleave(heads // kv_heads, 1).mT) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = alibi.distances(n_queries, n, device=CPU, dtype=torch.float64)
    scores = (scores + slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)
    weights = scores.softmax(-1)
    lost = weights.masked_fill(spread(kept, size, n_queries, n), 0).sum(-1)
    assert lost.max() < 2.0**-25
    needed = windows.needed_windows(windows.measure(q, k, 0.3, softcap=softcap), slopes, n, softcap)
    lost = weights.masked_fill(-distance <= needed[:, None, None], 0).sum(-1)
    assert lost.max() < 2.0**-25
    if steepness == 20.0 and scale_of_q < 1.0:
        assert not kept[:, 0, -1, 0].any()  # and something is dropped at all
        assert needed[0] < n / 2


def test_windows_drop_blocks_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block mask of a layer: a list for each head, the same mask inside blocks, values that cannot be told apart.

    FlexAttention ignores block lists on the CPU unless inductor compiles it, so the listed blocks are spread to pairs.
    """
    monkeypatch.setattr(flex, "LONG", 1024)
    n, heads = 1024, 4
    slopes = (1.0, 0.5, 0.25, 0.01)
    q, k, v = qkv(heads, heads, n, n)
    seen = Visibility(n, n, CPU, q.dtype, slopes=slopes)
    mask = FlexMask(seen)
    assert mask.windows
    assert mask.blocks is None
    assert not FlexMask(Visibility(n, n, CPU, q.dtype, slopes=slopes, skip_far_keys=False)).windows
    assert not FlexMask(Visibility(n, n, CPU, q.dtype)).windows
    assert mask.slopes is not None
    assert mask.margin is not None
    lists = flex._window_lists(q, k, *mask.kinds, mask.slopes, mask.margin, str(flex.BLOCK), "0.3", None)
    blocks = flex._block_mask(mask, *lists)
    assert blocks.shape == (2, heads, n, n)
    dense = blocks.to_dense().bool()
    shares = dense.float().mean((0, 2, 3)) / (36 / 64)
    assert shares[0] < 0.5
    assert shares[3] == 1
    assert (shares.diff() >= 0).all()
    expected = attention(EAGER, q, k, v, slopes=slopes)
    bias = dense_bias(seen).masked_fill(~spread(dense, flex.BLOCK, n, n), torch.finfo(torch.float64).min)
    found = EAGER.attend(q, k, v, bias, softmax_scale=0.3, dropout_p=0.0, softcap=None)
    assert (found - expected).abs().max() < 2**-24 * v.abs().max()
    through_flex = attention(FLEX, q, k, v, slopes=slopes)
    torch.testing.assert_close(through_flex, expected, rtol=0, atol=1e-7)


def test_steady_work_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """New masks of new batches, documents that lie elsewhere, a cache that grows: nothing is compiled again."""
    monkeypatch.setattr(flex, "LONG", 256)
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    slopes = tuple(alibi.slopes(4))
    q, k, v = qkv(4, 2, 256, 256, torch.float32)

    def compiled() -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def step(end: int, n_queries: int = 256, n_keys: int = 256) -> None:
        documented = {"documents": documents(n_keys, end)} if n_queries == n_keys else {}
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, n_keys - 256)) for x in (k, v))
        attention(FLEX, q[:, :, :n_queries], keys, values, slopes=slopes, **documented)

    step(3)
    before = compiled()
    for end in (40, 140, 200):
        step(end)
    assert compiled() == before
    for n_keys in (260, 400):
        step(0, 1, n_keys)
    before = compiled()
    for n_keys in (301, 302, 350, 400, 500):
        step(0, 1, n_keys)
    assert compiled() == before


def test_training_on_the_cpu_is_refused() -> None:
    q, k, v = qkv(2, 2, 8, 8)
    with pytest.raises(UserError, match="blockwise"):
        attention(FLEX, q.requires_grad_(), k, v)
    with torch.no_grad():
        attention(FLEX, q, k, v)


def test_dropout_is_refused() -> None:
    q, k, v = qkv(2, 2, 8, 8)
    mask = FLEX.prepare(Visibility(8, 8, CPU, q.dtype))
    with pytest.raises(UserError, match="attn_pdrop"):
        FLEX.attend(q, k, v, mask, softmax_scale=1.0, dropout_p=0.1, softcap=None)


def test_blocks_are_wide_for_long_sequences() -> None:
    mask = FlexMask(Visibility(flex.WIDE, flex.WIDE, CPU, torch.float32))
    assert mask.block == flex.WIDE_BLOCK
    assert mask.kinds.some.shape[-1] == flex.WIDE // flex.WIDE_BLOCK


def test_what_all_keys_share_costs_nothing() -> None:
    q, k, _ = qkv(2, 2, 64, 64)
    assert windows.measure(q, k + 100, 0.3, 8).key_norm.allclose(windows.measure(q, k, 0.3, 8).key_norm)
    capped = windows.measure(q, k + 100, 0.3, 8, softcap=1.0)
    assert capped.key_norm.min() > 100


def test_missing() -> None:
    assert flex.missing(CPU) is None
    if not torch.cuda.is_available():
        assert "Triton" in str(flex.missing(torch.device("cuda")))


def test_select() -> None:
    """By name on a CPU (to compare with); by itself `auto` never takes it there."""
    seen = Visibility(4096, 4096, CPU, torch.float32, slopes=(0.5,))
    assert select("flex", seen).kernel is FLEX
    assert select("flex", seen, flex_backend="flash").kernel is flex.FLEX_FLASH
    assert select("auto", seen).kernel.name == "blockwise"
    with pytest.raises(UserError, match="attn_pdrop"):
        select("flex", seen, dropout=True)


@pytest.mark.parametrize(
    ("n_queries", "dtype", "name"),
    [(1024, torch.bfloat16, "flex"), (1023, torch.bfloat16, "sdpa"), (1024, torch.float64, "blockwise")],
)
def test_auto_on_a_gpu(n_queries: int, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    seen = Visibility(n_queries, 70_000, torch.device("cuda"), dtype, slopes=(0.5,), padding=torch.ones(1, 70_000))
    if name == "sdpa":
        seen = dataclasses.replace(seen, n_keys=n_queries)
    choice = select("auto", seen)
    assert choice.kernel.name == name, choice.reason


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    monkeypatch.setattr(flex, "_has_flash_4", lambda: False)
    seen = Visibility(8, 8, torch.device("cuda"), torch.bfloat16)
    assert select("flex", seen).kernel is FLEX
    with pytest.raises(UserError, match="flex_backend"):
        select("flex", seen, flex_backend="flash")


@pytest.mark.skipif(not flex._MODES_CAN_BE_LEFT, reason="torch before 2.11 refuses")
def test_it_is_compiled_under_selective_checkpointing(caplog: pytest.LogCaptureFixture) -> None:
    """While a dispatch mode watches, torch would run FlexAttention uncompiled: all scores, and for good."""

    class Watches(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    torch._dynamo.reset()
    flex._compiled.cache_clear()
    flex._say_that_attention_is_recomputed.cache_clear()
    q, k, v = qkv(2, 2, 40, 40)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with Watches():  # type: ignore[no-untyped-call]
        found = attention(FLEX, q, k, v, slopes=(0.5, 0.25))
        attention(FLEX, q, k, v, slopes=(0.5, 0.25))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert caplog.text.count("compile_config") == 1
    torch.testing.assert_close(found, attention(EAGER, q, k, v, slopes=(0.5, 0.25)))


def test_an_old_torch_refuses_selective_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_MODES_CAN_BE_LEFT", False)
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
    with pytest.raises(UserError, match="selective"):
        attention(FLEX, *qkv(2, 2, 8, 8))
