"""Do several ranks compute the right gradient here? Asked before training, since a wrong one looks like training."""

import torch
import torch.distributed as dist
from torch import nn

from llmtrain.errors import UserError


def check_gradient_average(device: torch.device) -> None:
    """Trains one weight on all ranks and checks that FSDP2 averages its gradient.

    On torch 2.7 FSDP2 over gloo silently sums over ranks: AdamW hides it, but gradient clipping, SGD and a resume on
    another number of ranks are wrong. A check of the behaviour, not of the version.

    Raises:
        UserError: the gradient is not the mean over ranks.
    """
    from torch.distributed.fsdp import fully_shard

    world_size = dist.get_world_size()
    if world_size == 1:
        return
    layer = nn.Linear(1, world_size, bias=False).to(device)  # a row for each rank: each holds a shard
    fully_shard(layer)
    layer(torch.full((1, 1), float(dist.get_rank() + 1), device=device)).sum().backward()
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.full_tensor().mean().item()  # type: ignore[attr-defined]
    expected = (world_size + 1) / 2
    # NCCL multiplies by a rounded 1 / ranks; a sum would be off by a factor of at least two.
    if abs(gradient - expected) > 1e-3 * expected:
        raise UserError(
            f"torch {torch.__version__} computes wrong gradients for FSDP2 on {device.type} with {world_size} ranks: "
            f"{gradient:g} instead of the mean {expected:g} (its gloo reduce-scatter sums instead of averaging).\n"
            "Use torch >= 2.11 (`make setup` installs it), or train in a single process, or on GPUs."
        )
