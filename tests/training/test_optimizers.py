import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import nn

from llmtrain.errors import UserError
from llmtrain.testing.ranks import run_ranks
from llmtrain.training.decoupled_adamw import DecoupledAdamW
from llmtrain.training.lion import DecoupledLionW
from llmtrain.training.optimizers import OptimizerConfig, build_optimizer, parameter_groups

parse = TypeAdapter(OptimizerConfig).validate_python


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 8))
    model.add_module("norm", nn.LayerNorm(8))
    model.add_module("last", nn.Linear(8, 3))
    return model


def train_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, factors: tuple[float, ...] = ()
) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factors[step] if factors else group["lr"]
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"name": "decoupled_adamw", "lr": 1e-3}, DecoupledAdamW),
        ({"name": "adamw", "lr": "1e-3", "weight_decay": 0.1}, torch.optim.AdamW),
        ({"name": "decoupled_lionw", "betas": [0.9, 0.95]}, DecoupledLionW),
    ],
)
def test_every_name_builds_its_class_with_its_settings(config: dict, kind: type) -> None:
    optimizer = build_optimizer(parse(config), small_model())
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    for key, value in config.items():
        if key != "name":
            assert group[key] == pytest.approx(tuple(value) if isinstance(value, list) else float(value))


@given(
    lr=st.floats(1e-5, 1e-1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    decay=st.floats(0, 0.1),
    factor=st.floats(0.01, 1.0),
)
@settings(max_examples=25, deadline=None)
def test_lion_is_algorithm_2_of_the_paper(lr: float, beta1: float, beta2: float, decay: float, factor: float) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    optimizer = DecoupledLionW([weight], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    expected, momentum = weight.detach().clone(), torch.zeros(7, dtype=torch.float64)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = lr * factor
        gradient = torch.sin(torch.arange(7, dtype=torch.float64) * (step + 1.5))
        weight.grad = gradient.clone()
        optimizer.step()
        direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
        expected = expected * (1 - decay * factor) - lr * factor * direction
        momentum = beta2 * momentum + (1 - beta2) * gradient
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lion_resumes_from_its_state() -> None:
    straight, first = small_model(), small_model()
    config = parse({"name": "decoupled_lionw", "weight_decay": 1e-4})
    one = build_optimizer(config, straight)
    train_steps(straight, one, 2)
    two = build_optimizer(config, first)
    train_steps(first, two, 2)
    resumed = copy.deepcopy(first)
    three = build_optimizer(config, resumed)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    for model, optimizer in ((straight, one), (resumed, three)):
        train_steps(model, optimizer, 3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fused_adamw_computes_what_plain_adamw_does() -> None:
    fused, plain = small_model(), small_model()
    train_steps(fused, build_optimizer(parse({"name": "adamw"}), fused))
    train_steps(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-2, foreach=False))
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_groups_first_match_wins_and_the_rest_is_group_0() -> None:
    config = parse(
        {
            "name": "decoupled_adamw",
            "lr": 1e-3,
            "param_groups": [
                {"param_str_match": "norm|bias", "weight_decay": 0},
                {"param_str_match": "^last", "lr": 5e-4, "betas": [0.8, 0.9]},
            ],
        }
    )
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(config, model)
    taken = [sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups]
    assert taken == [["first.weight"], ["first.bias", "last.bias", "norm.bias", "norm.weight"], ["last.weight"]]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 5e-4]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 5e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-5, 0, 1e-5]
    assert optimizer.param_groups[2]["betas"] == (0.8, 0.9)


def test_a_group_that_takes_everything_leaves_no_empty_group_0() -> None:
    config = parse({"name": "adamw", "param_groups": [{"param_str_match": ".", "lr": 0.5}]})
    groups = parameter_groups(config, small_model())
    assert len(groups) == 1
    assert groups[0]["lr"] == 0.5


@pytest.mark.parametrize("patterns", ["^first", ["^first"]])
def test_disable_grad_freezes(patterns: object) -> None:
    model = small_model()
    before = model.first.weight.detach().clone()
    optimizer = build_optimizer(parse({"name": "decoupled_lionw", "disable_grad": patterns}), model)
    assert not model.first.weight.requires_grad
    last = model.last.weight.detach().clone()
    train_steps(model, optimizer)
    assert torch.equal(model.first.weight, before)
    assert not torch.equal(model.last.weight, last)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"disable_grad": "wpe"}, "disable_grad: `wpe` matches no parameter. Their names: first.weight"),
        ({"disable_grad": "."}, "nothing to train"),
        (
            {"param_groups": [{"param_str_match": "wte"}]},
            r"param_groups\[0\].param_str_match: `wte` matches no parameter",
        ),
        (
            {"param_groups": [{"param_str_match": "."}, {"param_str_match": "bias"}]},
            r"param_groups\[1\].*earlier groups took",
        ),
    ],
)
def test_a_pattern_without_effect_is_an_error(settings_: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(parse({"name": "adamw", **settings_}), small_model())


SHARDED = (
    {"name": "decoupled_lionw", "weight_decay": 1e-4},
    {"name": "adamw"},
    {"name": "decoupled_adamw", "param_groups": [{"param_str_match": "bias", "weight_decay": 0}]},
)


def _sharded_against_single() -> list[float]:
    """For each optimizer, the largest difference between a sharded and a single model after steps on the same data."""
    from torch.distributed.fsdp import fully_shard

    differences = []
    for config in SHARDED:
        single, sharded = small_model(), small_model()
        fully_shard(sharded)
        for model in (single, sharded):
            train_steps(model, build_optimizer(parse(config), model), 3)
        pairs = zip(single.parameters(), sharded.parameters(), strict=True)
        differences.append(max((a - b.full_tensor()).abs().max().item() for a, b in pairs))
    return differences


@pytest.mark.slow
def test_optimizers_step_sharded_parameters() -> None:
    for differences in run_ranks(_sharded_against_single, 2):
        assert dict(zip([config["name"] for config in SHARDED], differences, strict=True)) == pytest.approx(
            {"decoupled_lionw": 0, "adamw": 0, "decoupled_adamw": 0}, abs=1e-6
        )


def test_parameters_may_be_on_meta_when_the_optimizer_is_built() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    for name in ("adamw", "decoupled_adamw", "decoupled_lionw"):
        assert math.isclose(build_optimizer(parse({"name": name, "lr": 0.1}), model).param_groups[0]["lr"], 0.1)
