"""The chunked loss is F.cross_entropy on the full logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from llmtrain.model.loss import IGNORED, chunked_cross_entropy, rows_in_a_chunk, shift, soft_cap


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, -2), targets.flatten(), reduction="sum")


def problem(
    rows: int, vocab: int, d: int, ignored: list[bool], seed: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[torch.tensor(ignored[:rows] + [False] * (rows - len(ignored)), dtype=torch.bool)] = IGNORED
    return [hidden, weight, targets]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 23),
    vocab=st.integers(1, 40),
    d=st.integers(1, 9),
    ignored=st.lists(st.booleans(), max_size=23),
    rows_per_chunk=st.integers(1, 30),
    seed=st.integers(0, 99),
    outer=st.sampled_from([1.0, -0.37, 3.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
)
def test_equals_cross_entropy(
    rows: int,
    vocab: int,
    d: int,
    ignored: list[bool],
    rows_per_chunk: int,
    seed: int,
    outer: float,
    softcap: float | None,
) -> None:
    hidden, weight, targets = problem(rows, vocab, d, ignored, seed)
    logits = hidden @ weight.T if softcap is None else softcap * torch.tanh(hidden @ weight.T / softcap)
    each = F.cross_entropy(logits, targets, reduction="none")
    exact = each.sum()
    (outer * exact).backward()
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (hidden, weight)]
    hidden.grad = weight.grad = None

    size = 4 * vocab * rows_per_chunk
    loss = chunked_cross_entropy(
        hidden, weight, targets, chunk_bytes=size, count_correct=True, per_token=True, softcap=softcap
    )
    (outer * loss.loss_sum).backward()
    torch.testing.assert_close(loss.token_losses, each.detach())
    torch.testing.assert_close(loss.loss_sum, exact)
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(weight.grad, grads[1])
    assert loss.n_targets.dtype == torch.int64
    assert loss.n_targets == (targets != IGNORED).sum()
    assert loss.n_correct == (logits.argmax(-1) == targets).sum()
    torch.testing.assert_close(loss.token_correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 11 * 3])
def test_gradcheck(chunk_bytes: int | None, softcap: float | None) -> None:
    hidden, weight, targets = problem(8, 11, 4, [True, False, False, True, False, False, False, False], 3)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return chunked_cross_entropy(h, w, targets, chunk_bytes=chunk_bytes, softcap=softcap).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: loss(h, weight.detach()), (hidden,))
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w), (weight,))


def test_second_backward_through_a_retained_graph() -> None:
    hidden, weight, targets = problem(9, 11, 4, [], 4)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 11 * 2, softcap=3.0).loss_sum
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows_per_chunk", [5, 1000])
def test_under_bfloat16_autocast(rows_per_chunk: int) -> None:
    hidden, weight, targets = problem(64, 100, 32, [True] * 5, 5, torch.float32)
    exact = plain(hidden.double(), weight.double(), targets)
    exact.backward()
    grads = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(hidden, weight, targets).sub(exact).abs() < 0.02 * exact  # what the plain one achieves
        loss = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 100 * rows_per_chunk)
    loss.loss_sum.backward()
    assert loss.loss_sum.dtype == torch.float32
    assert (loss.loss_sum - exact).abs() < 0.005 * exact
    for t, expected in zip((hidden, weight), grads, strict=True):
        assert t.grad is not None
        assert expected is not None
        assert t.grad.dtype == torch.float32
        assert (t.grad - expected).norm() < 0.01 * expected.norm()


def test_bfloat16_weights() -> None:
    """FSDP's mixed precision hands over everything in bfloat16."""
    hidden, weight, targets = problem(64, 100, 32, [], 6, torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 100 * 7)
    loss.loss_sum.backward()
    exact = plain(hidden.double(), weight.double(), targets)
    assert (loss.loss_sum - exact).abs() < 0.005 * exact
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_bytes", [None, 4])
def test_nothing_to_learn_is_zero(chunk_bytes: int | None) -> None:
    hidden, weight, _ = problem(6, 10, 4, [], 7)
    loss = chunked_cross_entropy(hidden, weight, torch.full((6,), IGNORED), chunk_bytes=chunk_bytes, count_correct=True)
    (loss.loss_sum / loss.n_targets.clamp(min=1)).backward()
    assert loss.loss_sum == 0
    assert loss.n_targets == 0
    assert loss.n_correct == 0
    for t in (hidden, weight):
        assert t.grad is not None
        assert not t.grad.any()


def test_what_stands_in_ignored_rows_does_not_matter() -> None:
    hidden, weight, targets = problem(20, 10, 4, [True], 8)  # few are ignored, so their rows are not dropped
    with torch.no_grad():
        hidden[0] = float("inf")
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.loss_sum.backward()
    assert loss.loss_sum.isfinite()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert hidden.grad is not None
    assert not hidden.grad[0].any()


@pytest.mark.parametrize("ignored", [1, 5])  # few, whose rows are computed all the same, and many, which are dropped
def test_losses_of_tokens_stand_where_the_targets_do(ignored: int) -> None:
    hidden, weight, targets = problem(20, 10, 4, [True] * ignored, 12)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none").view(4, 5)
    loss = chunked_cross_entropy(
        hidden.view(4, 5, 4), weight, targets.view(4, 5), chunk_bytes=120, per_token=True, count_correct=True
    )
    torch.testing.assert_close(loss.token_losses, each.detach())
    torch.testing.assert_close(loss.token_correct, ((hidden @ weight.T).argmax(-1) == targets).view(4, 5))
    assert loss.token_losses is not None
    assert not loss.token_losses.requires_grad
    torch.testing.assert_close(loss.token_losses.sum(), loss.loss_sum.detach())
    assert not loss.token_losses.flatten()[:ignored].any()


def test_soft_cap() -> None:
    x = torch.tensor([0.0, 1e-3, -1e9, 1e9], dtype=torch.float64)
    torch.testing.assert_close(soft_cap(x, 30.0), torch.tensor([0.0, 1e-3, -30.0, 30.0], dtype=torch.float64))


def test_soft_capped_under_bfloat16_autocast() -> None:
    hidden, weight, targets = problem(64, 100, 32, [], 13, torch.float32)
    exact = F.cross_entropy(soft_cap(hidden.double() @ weight.double().T, 5.0), targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, softcap=5.0)
    assert (loss.loss_sum - exact).abs() < 0.005 * exact


def test_shift() -> None:
    assert shift(torch.tensor([[1, 2, 3], [4, IGNORED, 6]])).tolist() == [[2, 3, IGNORED], [IGNORED, 6, IGNORED]]
    assert shift(torch.tensor([[1]])).tolist() == [[IGNORED]]


def test_never_holds_all_logits() -> None:
    """The largest tensor that the loss makes, seen by a dispatch mode, is a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    hidden, weight, targets = problem(200, 1000, 4, [], 9, torch.float32)
    with Largest():
        chunked_cross_entropy(hidden, weight, targets, chunk_bytes=4 * 1000 * 10).loss_sum.backward()
    assert Largest.elements == 1000 * 10


def test_the_weight_gradient_is_not_copied() -> None:
    """Autograd takes the gradient as it is: the tensor in .grad is the one that the forward filled."""
    hidden, weight, targets = problem(20, 10, 4, [], 10)
    loss = chunked_cross_entropy(hidden, weight, targets).loss_sum
    assert loss.grad_fn is not None
    made = loss.grad_fn.grads.weight  # type: ignore[attr-defined]
    address = made.data_ptr()
    del made
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == address


def test_no_gradients_no_work() -> None:
    hidden, weight, targets = problem(20, 10, 4, [], 11)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss.loss_sum, F.cross_entropy(hidden @ weight.T, targets, reduction="sum").detach())
    assert loss.n_correct is None


@given(n=st.integers(0, 10_000), vocab=st.integers(1, 60_000), d=st.integers(1, 5000), size=st.integers(1, 2**30))
def test_rows_in_a_chunk(n: int, vocab: int, d: int, size: int) -> None:
    rows = rows_in_a_chunk(n, vocab, d, size)
    assert rows >= 1
    assert rows == 1 or rows * vocab * 4 <= size
    n_chunks = -(-n // rows)
    assert n == 0 or n_chunks * rows - n < rows
    fitting = max(1, size // (4 * vocab))
    assert n_chunks == -(-n // fitting)  # no more chunks than needed, and they are of about equal size


def test_default_chunk() -> None:
    assert rows_in_a_chunk(500, 4096, 256) == 500  # 8 MB of logits: one chunk
    assert rows_in_a_chunk(2048, 50_368, 768) == 342  # 125M: 64 MB hold 333 rows, half the weight 384
    assert rows_in_a_chunk(8192, 50_432, 4096) == 2048  # 7B: half the weight
