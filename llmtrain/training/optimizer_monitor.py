"""L2 norms of gradients, weights, moments and updates, right under any sharding and on any device."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.optim import DecoupledAdamW
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class OptimizerMonitor(Callback):  # type: ignore[misc]
    """Logs `l2_norm/grad/global` and, layer by layer, `l2_norm/{grad,param,moment,update}/NAME`.

    Composer's class of this name asks its optimizers for the metrics, whose reduction over ranks allocates on
    `torch.cuda.current_device()`: it ends a sharded run on CPU, and on GPUs it would sum DTensor norms that are
    reduced already. It also logs only for DecoupledAdamW. The metric names are Composer's. This can go when Composer's
    own knows DTensor.

    Gradients are those that the optimizer saw, after clipping. `update` is what one step takes from the weights, weight
    decay included; it is given for AdamW, whose moments determine it.

    Args:
        log_optimizer_metrics: Also log each layer, not only the global gradient norm.
        batch_log_interval: Every so many batches.
    """

    def __init__(self, log_optimizer_metrics: bool = True, batch_log_interval: int = 10) -> None:
        self.log_optimizer_metrics = log_optimizer_metrics
        self.batch_log_interval = batch_log_interval

    def batch_end(self, state: State, logger: Logger) -> None:
        """Computes and logs; all ranks take part."""
        if state.timestamp.batch.value % self.batch_log_interval:
            return
        metrics = norms(state.model, state.optimizers[0], layers=self.log_optimizer_metrics)
        logger.log_metrics(metrics)


@torch.no_grad()
def norms(model: torch.nn.Module, optimizer: Optimizer, *, layers: bool) -> dict[str, float]:
    """The metrics by name. Under sharding a collective: every rank calls it and gets the same numbers."""
    names: list[str] = []
    squares: list[Tensor] = []
    shards: dict[tuple[Any, ...], list[int]] = {}
    settings = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        measured = {"grad": parameter.grad}
        if layers:
            measured.update(_layer(parameter, optimizer, settings.get(id(parameter))))
        for kind, tensor in measured.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            shards.setdefault(_shard_groups(tensor), []).append(len(names))
            names.append(f"l2_norm/{kind}/{name}")
            squares.append(local.float().square().sum(dtype=torch.float32))
    if not squares:
        return {}
    total = torch.stack(squares)
    for groups, places in shards.items():  # one all-reduce for each mesh dimension, not one for each tensor
        part = total[places]
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total[places] = part
    values = dict(zip(names, total.tolist(), strict=True))
    gradient = math.sqrt(sum(value for name, value in values.items() if name.startswith("l2_norm/grad/")))
    metrics = {name: math.sqrt(value) for name, value in values.items()} if layers else {}
    return {**metrics, "l2_norm/grad/global": gradient}


def _shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which the parts of a tensor are spread."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def _layer(parameter: Tensor, optimizer: Optimizer, group: dict[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
    state = optimizer.state.get(parameter, {})
    yield "param", parameter.detach()
    if "exp_avg" not in state:
        return
    yield "moment", state["exp_avg"]
    if group is None or "exp_avg_sq" not in state:
        return
    lr, (beta1, beta2), step = group["lr"], group["betas"], float(state["step"])
    if step < 1:
        return
    square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    denominator = (square / (1 - beta2**step)).sqrt().add_(group["eps"])
    update = state["exp_avg"] / denominator * (lr / (1 - beta1**step))
    # torch's AdamW decays by lr * weight_decay, Composer's by weight_decay * lr / initial_lr.
    decay = group["weight_decay"]
    if isinstance(optimizer, DecoupledAdamW):
        initial = group.get("initial_lr", lr)
        decay *= lr / initial if initial else 1.0
    else:
        decay *= lr
    yield "update", update.add_(parameter, alpha=decay)
