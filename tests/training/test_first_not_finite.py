"""The search for the module where a value that is not finite comes up first."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.training.first_not_finite import Culprit, not_finite, search, weight_with_bad_gradient


class Root(torch.autograd.Function):
    """A square root that is asked for at 0, as a norm without epsilon would be: fine forward, inf backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.inf


class Norm(nn.Module):
    bad = False

    def forward(self, x: Tensor) -> Tensor:
        return Root.apply(x) if self.bad else x  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(), nn.Linear(4, 8), nn.Linear(8, 4)
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.recomputes else self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor]]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return {"nested": (x,)}


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 4))["nested"][0].square().mean()  # type: ignore[no-any-return]


@pytest.fixture(params=[False, True], ids=["plain", "recomputed"])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    made = Model()
    for block in made.blocks:
        block.recomputes = request.param
    return made


def test_everything_is_finite(model: Model) -> None:
    assert search(model, loss_of, backward=False) is None
    assert search(model, loss_of, backward=True) is None
    assert weight_with_bad_gradient(model) is None


def test_first_module_in_the_order_of_execution(model: Model) -> None:
    model.blocks[1].up.register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([3]), math.nan))
    for backward in (False, True):
        found = search(model, loss_of, backward=backward)
        assert found == Culprit("blocks.1.up", "forward", "2 of 16 values of its output are not finite")


@pytest.mark.parametrize("block", [0, 2])
def test_module_whose_backward_is_the_first_to_go_wrong(model: Model, block: int) -> None:
    model.blocks[block].norm.bad = True
    assert search(model, loss_of, backward=False) is None
    found = search(model, loss_of, backward=True)
    assert found is not None
    assert (found.module, found.phase) == (f"blocks.{block}.norm", "backward")
    assert weight_with_bad_gradient(model) is not None


def test_what_lies_between_modules_is_their_parents(model: Model) -> None:
    out: Callable[..., Tensor] = lambda module, args, output: Root.apply(output)  # noqa: E731
    model.blocks[1].up.register_forward_hook(out)
    found = search(model, loss_of, backward=True)
    # The gradient goes wrong behind `up`, whose own output is what the hook was given.
    assert found is not None
    assert found.module in ("blocks.1.up", "blocks.1")


def test_a_loss_of_its_own(model: Model) -> None:
    found = search(model, lambda module: loss_of(module) * math.inf, backward=False)
    assert found is not None
    assert found.module == ""
    assert "the loss" in found.what


def test_hooks_are_gone_afterwards(model: Model) -> None:
    search(model, loss_of, backward=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_weights_that_are_not_finite() -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = math.nan
        model.embed.bias[1] = -math.inf
    assert not_finite(model.named_parameters()) == ["embed.bias", "blocks.1.down.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 1, 499, 998):
        values = torch.linspace(-1e4, 1e4, 999, dtype=dtype)
        assert not_finite(iter([("w", values)])) == []
        values[place] = bad
        assert not_finite(iter([("w", values)])) == ["w"]
        assert not_finite(iter([("w", values.view(3, 333).t())])) == ["w"]


def test_nothing_and_whole_numbers_are_finite() -> None:
    assert (
        not_finite(iter([("empty", torch.empty(0)), ("count", torch.tensor([1, 2])), ("one", torch.tensor(1.0))])) == []
    )
