"""Lion with decoupled weight decay."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger(__name__)


class DecoupledLionW(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2); weight decay follows the schedule but not the rate.

    With momentum m, gradient g, weight w and schedule factor s = lr / initial lr::

        w <- w * (1 - s * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    Only element-wise operations, so parameters may be DTensors. One buffer for each parameter (`exp_avg`).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate: every weight moves by this much at each step.
        betas: (beta1, beta2).
        weight_decay: Part of a weight taken away at each step while lr is the initial one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, betas {betas} or weight_decay {weight_decay} is out of range")
        if weight_decay >= 1e-3:
            log.warning("weight_decay %g of decoupled_lionw takes %g%% of every weight at each step", weight_decay,
                        100 * weight_decay)  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            initial = group.setdefault("initial_lr", lr)
            decay = group["weight_decay"] * (lr / initial if initial else 1.0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, lr, beta1, beta2, decay)
        return loss

    def _update(self, parameter: Tensor, lr: float, beta1: float, beta2: float, decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum = state["exp_avg"]
        direction = momentum.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
        if decay:
            parameter.mul_(1 - decay)
        parameter.add_(direction, alpha=-lr)
        momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)
