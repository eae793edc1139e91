"""Blockwise attention: what its plan covers, which keys it skips, how exact it is, and how it is compiled."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model import alibi
from llmtrain.model.kernels.alibi_window import share_kept, share_measured
from llmtrain.model.kernels.blockwise import BLOCKWISE, blockwise_attention
from llmtrain.model.kernels.blockwise_plan import Block, plan
from llmtrain.model.kernels.dense import dense_bias
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility

CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    numbers=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    left=st.none() | st.integers(0, 60),
    window=st.none() | st.integers(0, 300),
    new=st.integers(1, 400),
    masked=st.booleans(),
)
def test_the_plan_covers_what_is_seen(
    lengths: list[int], numbers: list[int], left: int | None, window: int | None, new: int, masked: bool
) -> None:
    """Every query is in one block; keys a block takes for whole are seen by all its queries; none is missing."""
    documents = None
    n = 5 * sum(lengths)
    if masked:
        row = [number for number, length in zip(numbers, lengths, strict=False) for _ in range(5 * length)]
        documents = torch.tensor([row, [1] * n])
    padding = None
    if left is not None:
        padding = torch.ones(2, n, dtype=torch.bool)
        padding[1, :left] = False
    queries = min(new, n)
    seen = Visibility(queries, n, CPU, torch.float32, (0.5,), padding, documents, window)
    allowed = (dense_bias(seen) > -1e30)[:, 0].expand(2, -1, -1)
    blocks, labels = plan(seen)
    counted = torch.zeros(2, queries)
    for block in (Block(*b) for b in blocks.tolist()):
        rows = slice(None) if block.row < 0 else slice(block.row, block.row + 1)
        own = slice(block.first_query - n + queries, block.end_query - n + queries)
        counted[rows, own] += 1
        pairs = allowed[rows, own]
        assert not pairs[..., : block.visible].any()
        assert not pairs[..., block.end_query :].any()
        assert pairs[..., block.whole_from : block.whole_to].all()
        if block.causal:
            size = block.end_query - block.first_query
            assert torch.equal(pairs[0, :, block.whole_to : block.end_query], torch.ones(size, size).tril().bool())
    assert (counted == 1).all()
    assert (labels is None) == (documents is None and padding is None)


def call(seen: Visibility, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Result, first keys and plan."""
    blocks = BLOCKWISE.prepare(seen)
    result = blockwise_attention(q, k, v, blocks.plan, blocks.slopes, None, -1, q.shape[-1] ** -0.5, None, blocks.skip)
    return result[0], result[2], blocks.plan


@settings(few, max_examples=12)
@given(
    size=st.floats(0.1, 6.0),
    common=st.floats(0.0, 6.0),
    spike=st.floats(1.0, 30.0),
    heads=st.sampled_from([1, 5, 8]),
    bias_max=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 9999),
)
def test_no_key_that_matters_is_skipped(
    size: float, common: float, spike: float, heads: int, bias_max: int, seed: int
) -> None:
    """All skipped keys together weigh less than 2^-25 in each row, whatever norms, common parts and single keys are."""
    n, generator = 800, torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, n, 8, generator=generator) * size
    k += common * torch.randn(1, heads, 1, 8, generator=generator)
    k[:, :, torch.randint(0, n, (3,), generator=generator)] *= spike
    slopes = tuple(alibi.slopes(heads, bias_max))
    _, first, blocks = call(Visibility(n, n, CPU, torch.float32, slopes), q, k, v)
    bias = dense_bias(Visibility(n, n, CPU, torch.float64, slopes))
    weights = (q.double() @ k.double().transpose(-2, -1) * 8**-0.5 + bias).softmax(-1)
    for (_, begin, end, *_), starts in zip(blocks.tolist(), first.tolist(), strict=True):
        for head, start in enumerate(starts):
            if start:
                assert weights[0, head, begin:end, :start].sum(-1).max() < 2**-25


def test_a_far_key_that_is_not_finite_is_not_hidden() -> None:
    """Without windows every row behind it would be NaN: so with them, however far it is."""
    q, k, v = torch.randn(3, 1, 2, 1000, 8, generator=torch.Generator().manual_seed(0))
    k[:, :, 3, 0] = torch.nan
    result, _, _ = call(Visibility(1000, 1000, CPU, torch.float32, (1.0, 0.5)), q, k, v)
    assert result[:, :, 3:].isnan().all()
    assert result[:, :, :3].isfinite().all()


def errors(kernel: Kernel, inputs: Tensor, exact: list[Tensor], *, skip: bool = True, row: bool = False) -> list[float]:
    """Root mean square error of the output and of the gradients of q, k and v."""
    results = gradients(kernel, inputs, skip=skip, row=row)
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(results, exact, strict=True)]


def gradients(kernel: Kernel, inputs: Tensor, *, skip: bool = True, row: bool = False) -> list[Tensor]:
    q, k, v = (x.requires_grad_() for x in inputs.detach().unbind())
    heads, n = q.shape[1:3]
    slopes = tuple(alibi.slopes(heads))
    if row:  # transformers' MPT: slope * (j - T + 1)
        bias = torch.tensor(slopes, dtype=q.dtype)[:, None, None] * torch.arange(1 - n, 1, dtype=q.dtype)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
        future = torch.ones(n, n, dtype=torch.bool).triu_(1)
        out = scores.masked_fill(future, torch.finfo(q.dtype).min).softmax(-1) @ v
    else:
        seen = Visibility(n, n, CPU, q.dtype, slopes, skip_far_keys=skip)
        out = Attention(kernel, kernel.prepare(seen))(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@pytest.mark.parametrize(("heads", "n", "better"), [(12, 512, 2), (8, 1200, 5)])
def test_more_exact_than_the_row_form(heads: int, n: int, better: float) -> None:
    """Errors against float64, values and gradients, are a part of transformers', and skipping keys adds nothing."""
    inputs = torch.randn(3, 1, heads, n, 16, generator=torch.Generator().manual_seed(n))
    exact = gradients(EAGER, inputs.double())
    theirs = errors(EAGER, inputs, exact, row=True)
    ours = errors(BLOCKWISE, inputs, exact)
    without = errors(BLOCKWISE, inputs, exact, skip=False)
    for mine, other, computed in zip(ours, theirs, without, strict=True):
        assert mine < other / better
        assert mine == pytest.approx(computed, rel=0.02)


def test_share_of_keys_kept() -> None:
    """Measured on random keys, and the a-priori share of the figures in docs/benchmarks.md."""
    slopes = tuple(alibi.slopes(4))
    q, k, v = torch.randn(3, 1, 4, 4000, 8, generator=torch.Generator().manual_seed(0))
    _, first, blocks = call(Visibility(4000, 4000, CPU, torch.float32, slopes), q, k, v)
    assert share_measured(first, blocks) < 0.7
    off = Visibility(4000, 4000, CPU, torch.float32, slopes, skip_far_keys=False)
    assert share_measured(call(off, q, k, v)[1], plan(off)[0]) == 1
    assert share_kept(slopes, 4000, bound=1e9) == 1
    assert share_kept(slopes, 4000, bound=6.0) < 0.7
    assert share_kept(tuple(alibi.slopes(32)), 65536, 10) == pytest.approx(0.076, abs=0.002)


def test_dropout_is_refused() -> None:
    q = torch.randn(1, 1, 4, 8)
    seen = Visibility(4, 4, CPU, torch.float32)
    with pytest.raises(UserError, match="attn_pdrop"):
        Attention(BLOCKWISE, BLOCKWISE.prepare(seen))(q, q, q, softmax_scale=1.0, dropout_p=0.1)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch 2.7 compiles again for each new object among a block's arguments",
)
def test_compiles_into_one_graph_for_all_packings() -> None:
    """No graph break, and other documents compile nothing again."""
    frames = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal frames
        frames += 1
        return graph

    def block(x: Tensor, attend: Attention) -> Tensor:
        return attend(x * 2, x, x, softmax_scale=0.5).sin()

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=count, fullgraph=True)
    x = torch.randn(1, 2, 300, 8, requires_grad=True)
    for cuts in ((100,), (50, 200), (10, 20, 150), (77, 140)):
        documents = torch.bucketize(torch.arange(300), torch.tensor(cuts), right=True)[None]
        seen = Visibility(300, 300, CPU, x.dtype, tuple(alibi.slopes(2)), documents=documents)
        attend = Attention(BLOCKWISE, BLOCKWISE.prepare(seen))
        actual, expected = compiled(x, attend), block(x, attend)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)))
    assert frames <= 2  # with the number of blocks as a constant, then as a variable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_the_operator_is_what_it_says(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Shapes, strides and gradients of the fake operators are those of the real ones."""
    q = torch.randn(2, 40, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 40, kv_heads, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2))
    documents = torch.arange(40).div(17, rounding_mode="floor").expand(2, -1).contiguous()
    for seen in (
        Visibility(40, 40, CPU, dtype, tuple(alibi.slopes(heads))),
        Visibility(40, 40, CPU, dtype, documents=documents),
    ):
        b = BLOCKWISE.prepare(seen)
        torch.library.opcheck(
            blockwise_attention, (q, k, v, b.plan, b.slopes, b.labels, b.window, 0.3, None, b.skip),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


LONG = """
import time, torch
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.model.kernels.denormals import flush_denormals

def megabytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

flush_denormals()
before = megabytes("VmRSS")
attn = {"alibi": True, "attn_impl": "blockwise"}
model = MPT(MPTConfig(d_model=128, n_heads=4, n_layers=2, vocab_size=4096, max_seq_len=16384, attn_config=attn))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(0, 4096, (1, 16384))
model(ids, labels=ids).loss.backward()
optimizer.step()
print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_16384_tokens_in_little_memory() -> None:
    """A whole step of a small model; the scores of a layer alone would be 4.3 GB. (500 MB; 65,536 tokens: docs.)"""
    out = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True).stdout
    assert float(out) < 700


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_grouped_keys_of_any_sizes(batch: int, kv_heads: int, group: int, contiguous: bool) -> None:
    """Also where the batch has as many rows as there are key heads, and these as many as a group has queries."""
    n, heads = 14, kv_heads * group
    seen = Visibility(n, n, CPU, torch.float64, tuple(alibi.slopes(heads)))
    results = []
    for kernel in (EAGER, BLOCKWISE):
        g = torch.Generator().manual_seed(0)
        made = [torch.randn(batch, n, h, 6, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
        q, k, v = (t.transpose(1, 2) for t in made)
        if contiguous:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = Attention(kernel, kernel.prepare(seen))(*leaves, softmax_scale=0.4)
        weights = torch.randn(out.shape, generator=g, dtype=torch.float64)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
