"""Composer's DecoupledAdamW through torch's fused kernel."""

import torch
from composer.optim import DecoupledAdamW as ComposersDecoupledAdamW
from torch import Tensor
from torch.distributed.tensor import DTensor

HAS_KERNEL = ("cpu", "cuda")


class DecoupledAdamW(ComposersDecoupledAdamW):  # type: ignore[misc]
    """Composer's optimizer of this name, with one pass over the memory for each parameter instead of about ten.

    The mathematics, the state (`step`, `exp_avg`, `exp_avg_sq`) and the groups are Composer's, and so is the class
    name, under which checkpoints hold the state: its checkpoints continue here and ours there. Sharded parameters
    (DTensor) are updated shard by shard, which is exact because nothing but element-wise arithmetic happens.
    """

    @staticmethod
    def adamw(
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
        *,
        amsgrad: bool,
        beta1: float,
        beta2: float,
        lr: float,
        initial_lr: float,
        weight_decay: float,
        eps: float,
    ) -> None:
        """Updates parameters and averages in place; `state_steps` have counted this step already."""
        fused: dict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = {}
        for i, step in enumerate(state_steps):
            # What an update reads and writes: parameter, gradient, averages, and with amsgrad the maximum.
            whole = [params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], *max_exp_avg_sqs[i : i + 1]]
            row = [t.to_local() if isinstance(t, DTensor) else t for t in whole]
            param = row[0]
            if param.numel() == 0:
                continue
            # The kernel goes through the memory of all of them in the same order.
            if param.device.type in HAS_KERNEL and all(t.is_contiguous() and t.dtype == param.dtype for t in row):
                # A step that was loaded may lie elsewhere.
                fused.setdefault((param.device, param.dtype), []).append([*row, step.to(param.device)])
            else:
                lists = [[t] for t in row] + [[]] * (5 - len(row))
                ComposersDecoupledAdamW.adamw(
                    *lists,
                    [step],
                    amsgrad=amsgrad,
                    beta1=beta1,
                    beta2=beta2,
                    lr=lr,
                    initial_lr=initial_lr,
                    weight_decay=weight_decay,
                    eps=eps,
                )
        for rows in fused.values():
            columns = [list(column) for column in zip(*rows, strict=True)]
            decay = 0.0
            if initial_lr:
                decay = weight_decay / initial_lr  # the kernel multiplies it by lr
            elif weight_decay:
                torch._foreach_mul_(columns[0], 1 - weight_decay)
            torch._fused_adamw_(
                columns[0],
                columns[1],
                columns[2],
                columns[3],
                columns[4] if amsgrad else [],
                columns[-1],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                amsgrad=amsgrad,
                maximize=False,
            )
