"""Optimizers by name, parameter groups and frozen parameters.

The configs are light; torch and composer are imported when an optimizer is built.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from llmtrain.config.base import Config
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"Not a regular expression: {error}.") from None
    return value


class ParamGroup(Config):
    """Other settings for the parameters whose names match. What is left out is the optimizer's."""

    param_str_match: str
    """Regular expression, searched in parameter names such as `model.transformer.blocks.0.attn.Wqkv.weight`."""
    lr: Rate | None = None
    """Learning rate."""
    weight_decay: Rate | None = None
    """Weight decay."""
    betas: tuple[Momentum, Momentum] | None = None
    """Decay rates of the running averages."""
    eps: Rate | None = None
    """Added to the denominator (not for Lion)."""

    _check = field_validator("param_str_match")(_regex)


class _Optimizer(Config):
    ADVICE: ClassVar[Mapping[str, str]] = {
        "learning_rate": "It is called `lr`.",
        "params": "The parameters are the model's. Use `param_groups` to give some of them other settings.",
        "no_decay": "Write a group: `param_groups: [{param_str_match: 'norm|bias', weight_decay: 0}]`.",
    }

    weight_decay: Rate
    param_groups: tuple[ParamGroup, ...] = ()
    """Groups with settings of their own; the first match wins, and what no group takes has the settings above."""
    disable_grad: tuple[str, ...] = ()
    """Regular expressions: parameters whose names match are frozen."""

    @field_validator("disable_grad", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("disable_grad")
    @classmethod
    def _are_regexes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_regex(pattern) for pattern in value)

    @field_validator("param_groups", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value is None else value


class DecoupledAdamWConfig(_Optimizer):
    """Composer's DecoupledAdamW: weights shrink by `weight_decay * lr / initial lr` at each step, not by `* lr`."""

    name: Literal["decoupled_adamw"]
    """Which optimizer."""
    lr: Rate = 1e-3
    """Learning rate at the schedule's peak."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """Decay rates of the running averages of the gradient and its square."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Rate = 1e-5
    """Part of each weight taken away at each step at peak learning rate. 1e-5 here is about 1e-2 in `adamw`."""
    amsgrad: bool = False
    """Use the largest running average of the squared gradient so far."""


class AdamWConfig(_Optimizer):
    """torch.optim.AdamW: weights shrink by `weight_decay * lr` at each step."""

    name: Literal["adamw"]
    """Which optimizer."""
    lr: Rate = 1e-3
    """Learning rate at the schedule's peak."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and its square."""
    eps: Rate = 1e-8
    """Added to the denominator."""
    weight_decay: Rate = 1e-2
    """Times `lr`: part of each weight taken away at each step."""
    amsgrad: bool = False
    """Use the largest running average of the squared gradient so far."""
    fused: bool = True
    """One kernel for the whole update: 4-5 times faster than torch's default on CPU, and faster on GPUs."""


class DecoupledLionWConfig(_Optimizer):
    """Lion (arXiv:2302.06675, algorithm 2) with weight decay scaled by `lr / initial lr`."""

    name: Literal["decoupled_lionw"]
    """Which optimizer."""
    lr: Rate = 1e-4
    """Learning rate at the schedule's peak: each weight moves by this much. 3 to 10 times smaller than AdamW's."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    """Interpolation for the update, and decay rate of the momentum."""
    weight_decay: Rate = 0.0
    """Part of each weight taken away at each step at peak learning rate."""
    eps: None = None
    """Lion has none. Null is accepted, so that overrides alone can turn an AdamW block into this one."""


OptimizerConfig = Annotated[DecoupledAdamWConfig | AdamWConfig | DecoupledLionWConfig, Field(discriminator="name")]


def build_optimizer(cfg: OptimizerConfig, model: "nn.Module") -> "Optimizer":
    """Freeze what `disable_grad` names, group the rest, and make the optimizer.

    Args:
        cfg: Which optimizer, with which settings.
        model: Its parameters may be on the meta device. Those that match `disable_grad` are changed: they no longer
            require a gradient.

    Raises:
        UserError: A regular expression matches nothing, or nothing is left to train.
    """
    groups = parameter_groups(cfg, model)
    settings = cfg.model_dump(exclude={"name", "param_groups", "disable_grad"})
    if isinstance(cfg, DecoupledLionWConfig):
        del settings["eps"]
    if isinstance(cfg, DecoupledAdamWConfig):
        from llmtrain.training.decoupled_adamw import DecoupledAdamW

        decoupled: Optimizer = DecoupledAdamW(groups, **settings)
        return decoupled
    if isinstance(cfg, AdamWConfig):
        from torch.optim import AdamW

        return AdamW(groups, **settings)
    from llmtrain.training.lion import DecoupledLionW

    return DecoupledLionW(groups, **settings)


def parameter_groups(cfg: OptimizerConfig, model: "nn.Module") -> list[dict[str, Any]]:
    """Parameter groups for torch: group 0 is the rest, then one for each of `param_groups`, in order.

    Raises:
        UserError: A regular expression matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in cfg.disable_grad:
        frozen = [name for name in parameters if re.search(pattern, name)]
        if not frozen:
            raise UserError(_no_match("optimizer.disable_grad", pattern, parameters))
        for name in frozen:
            parameters[name].requires_grad_(False)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise UserError("optimizer.disable_grad: every parameter is frozen, so there is nothing to train.")

    rest, groups = dict(trained), []
    for index, group in enumerate(cfg.param_groups):
        key = f"optimizer.param_groups[{index}].param_str_match"
        taken = [name for name in rest if re.search(group.param_str_match, name)]
        if not taken:
            if any(re.search(group.param_str_match, name) for name in trained):
                raise UserError(
                    f"{key}: `{group.param_str_match}` matches only parameters that earlier groups took (the first "
                    "match wins). Move it up, or narrow the ones before."
                )
            raise UserError(_no_match(key, group.param_str_match, trained))
        overrides = group.model_dump(exclude={"param_str_match"}, exclude_none=True)
        if isinstance(cfg, DecoupledLionWConfig):
            overrides.pop("eps", None)
        groups.append({"params": [rest.pop(name) for name in taken], **overrides})
    return [{"params": list(rest.values())}, *groups] if rest else groups


def _no_match(key: str, pattern: str, parameters: dict[str, Any]) -> str:
    names = list(parameters)
    shown = names if len(names) <= 6 else [*names[:4], "...", *names[-2:]]
    return f"{key}: `{pattern}` matches no parameter. Their names: {', '.join(shown)}."
