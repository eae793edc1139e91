"""The fused DecoupledAdamW is Composer's: numbers, state, groups, checkpoints."""

import copy
from typing import Any

import pytest
import torch
from composer.optim import DecoupledAdamW as Composers
from torch import Tensor, nn

from llmtrain.testing.ranks import run_ranks
from llmtrain.training.decoupled_adamw import DecoupledAdamW


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (300, 11), (1,), (0, 3)]
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def groups(ps: list[Any]) -> list[dict[str, Any]]:
    return [{"params": ps[:1], "weight_decay": 0.0, "betas": (0.8, 0.9)}, {"params": ps[1:], "lr": 3e-3, "eps": 1e-6}]


def run(optimizer: torch.optim.Optimizer, steps: range, factor: float | None = None) -> list[Tensor]:
    """Steps on gradients that depend on the step alone, with a schedule that begins at 0."""
    ps = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (min(step / 10, 1.0) if factor is None else factor)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in ps]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_same_weights_after_fifty_steps(dtype: torch.dtype, tolerance: float, amsgrad: bool) -> None:
    settings = {"lr": 1e-2, "weight_decay": 9e-4, "amsgrad": amsgrad}
    ours, theirs = (run(kind(groups(parameters(dtype)), **settings), range(50)) for kind in (DecoupledAdamW, Composers))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("lr", "factor"), [(0.0, 0.0), (0.0, None), (1e-2, 0.0)])
def test_learning_rate_zero(lr: float, factor: float | None) -> None:
    """With an initial rate of 0 the decay has no schedule to follow and is applied whole; else it follows to 0."""
    ours, theirs = (
        run(kind(parameters(), lr=lr, weight_decay=9e-4), range(5), factor) for kind in (DecoupledAdamW, Composers)
    )
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(a, start) == (lr > 0 or start.numel() == 0)


@pytest.mark.parametrize(("first", "then"), [(Composers, DecoupledAdamW), (DecoupledAdamW, Composers)])
def test_checkpoints_continue_on_either_side(first: type, then: type) -> None:
    assert DecoupledAdamW.__qualname__ == Composers.__qualname__  # the name that holds the state in a checkpoint
    whole = run(Composers(groups(parameters()), lr=1e-2), range(8))
    begun = first(groups(parameters()), lr=1e-2)
    run(begun, range(5))
    saved = copy.deepcopy(begun.state_dict())
    resumed = then(groups([p for group in begun.param_groups for p in group["params"]]), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(saved))
    now = resumed.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    assert now["state"].keys() == saved["state"].keys()
    for number, state in saved["state"].items():
        assert now["state"][number].keys() == state.keys()
        assert all(torch.equal(now["state"][number][key], value) for key, value in state.items())
    for a, b in zip(run(resumed, range(5, 8)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_parameters_that_are_not_contiguous_take_composers_loop() -> None:
    def transposed() -> list[nn.Parameter]:
        return [nn.Parameter(torch.arange(12.0).view(3, 4).t())]

    ours, theirs = (run(kind(transposed(), lr=1e-2), range(3))[0] for kind in (DecoupledAdamW, Composers))
    torch.testing.assert_close(ours, theirs)


def _sharded(amsgrad: bool) -> float:
    from torch.distributed.fsdp import fully_shard

    def stepped(shard: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 1, bias=False))  # 1 row: one rank has none of it
        if shard:
            fully_shard(model)
        optimizer = DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=9e-4, amsgrad=amsgrad)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        return model

    single, sharded = stepped(False), stepped(True)
    pairs = zip(single.parameters(), sharded.parameters(), strict=True)
    return max(float((a - b.full_tensor()).detach().abs().max()) for a, b in pairs)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.gloo_training
def test_sharded_parameters() -> None:
    for difference in run_ranks(_sharded, 2, True):
        assert difference < 1e-6
