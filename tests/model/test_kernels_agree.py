"""All kernels compute what eager computes in float64: values and gradients, over the ways that options meet."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model import alibi
from llmtrain.model.kernels import pieces
from llmtrain.model.kernels.blockwise import BLOCKWISE
from llmtrain.model.kernels.eager import EAGER
from llmtrain.model.kernels.interface import Attention, Kernel, Visibility
from llmtrain.model.kernels.sdpa import SDPA

# heads, key heads, head_dim, queries, keys, alibi_bias_max, and what else
CASES: list[tuple[int, int, int, int, int, int | None, dict[str, Any]]] = [
    (1, 1, 16, 1, 1, 8, {}),
    (5, 5, 64, 33, 33, 16, {"padding": True}),
    (8, 8, 128, 257, 257, 8, {}),
    (12, 12, 16, 700, 700, 8, {}),
    (12, 4, 64, 301, 301, 16, {"documents": 40}),
    (8, 2, 16, 600, 600, 8, {"window": 100}),
    (5, 1, 64, 95, 333, 8, {}),
    (8, 4, 16, 1, 130, 16, {"padding": True}),
    (5, 5, 16, 40, 300, None, {"padding": True, "window": 64}),
    (8, 8, 64, 333, 333, None, {}),
    (12, 3, 128, 129, 129, None, {"documents": 9}),
    (12, 12, 16, 517, 517, 8, {"documents": 150, "padding": True}),
    (5, 5, 16, 400, 400, 8, {"documents": 200, "window": 30}),
    (8, 2, 16, 513, 513, 16, {"softcap": 2.0, "padding": True}),
    (12, 12, 16, 300, 300, None, {"softcap": 5.0, "documents": 33, "window": 50}),
    (5, 1, 16, 310, 310, 8, {"back": 70}),
    (4, 2, 16, 300, 300, 8, {}),  # as many key heads as rows, and queries a key head
    (1, 1, 16, 4097, 4097, 16, {}),
    (1, 1, 64, 2500, 2500, 8, {"window": 1100}),
]


def in_detail(kernel: Kernel, inputs: list[Tensor], bias_max: int | None, extra: dict[str, Any]) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    batch, heads, n_queries, head_dim = q.shape
    n_keys = k.shape[2]
    generator = torch.Generator().manual_seed(5)
    documents = padding = None
    if "documents" in extra:
        ends = torch.randint(1, 2 * extra["documents"], (batch, n_keys), generator=generator).cumsum(1)
        documents = torch.searchsorted(ends, torch.arange(n_keys).expand(batch, -1).contiguous(), right=True)
    if "back" in extra:  # every second document is the same one
        documents = (torch.arange(n_keys) // extra["back"] % 2).expand(batch, -1)
    if "padding" in extra:
        padding = torch.ones(batch, n_keys, dtype=torch.bool)
        padding[0, : n_keys // 3] = False
    seen = Visibility(
        n_queries,
        n_keys,
        q.device,
        q.dtype,
        slopes=None if bias_max is None else tuple(alibi.slopes(heads, bias_max)),
        padding=padding,
        documents=documents,
        window=extra.get("window"),
    )
    attend = Attention(kernel, kernel.prepare(seen))
    out = attend(q, k, v, softmax_scale=head_dim**-0.5, softcap=extra.get("softcap"))
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), (q, k, v))]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join(map(str, (*c[:6], *(f"{k}{v}" for k, v in c[6].items()))))
)
def test_kernels_agree(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, kv_heads, head_dim, n_queries, n_keys, bias_max, extra = case
    generator = torch.Generator().manual_seed(heads * n_keys)
    batch = 1 if n_keys > 1000 else 2
    shapes = [(batch, heads, n_queries, head_dim), *[(batch, kv_heads, n_keys, head_dim)] * 2]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = in_detail(EAGER, inputs, bias_max, extra)
    runs = [(BLOCKWISE, torch.float64, 1e-11), (BLOCKWISE, torch.float32, 3e-5), (BLOCKWISE, torch.bfloat16, 0.03)]
    if "softcap" not in extra:
        runs.append((SDPA, torch.float32, 1e-4))
    for kernel, dtype, tolerance in runs:
        actual = in_detail(kernel, [x.to(dtype) for x in inputs], bias_max, extra)
        compare(actual, expected, tolerance)
    if n_keys < 1000:  # without torch's private kernel
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "flash_on_cpu", lambda: False)
            compare(in_detail(BLOCKWISE, inputs, bias_max, extra), expected, 1e-11)


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for right, result in zip(expected, actual, strict=True):
        atol = tolerance * max(1.0, right.abs().max().item())
        torch.testing.assert_close(result.double(), right, rtol=0, atol=atol)
