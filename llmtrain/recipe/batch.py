"""Batch arithmetic: samples of one optimizer step over ranks and micro-batches. Light.

The global batch size is mathematics (it decides what is learned); the micro-batch size is execution (it decides what
fits into memory). The same recipe means the same on any number of ranks that divides the global batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.recipe.recipe import Recipe


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is worked off.

    Attributes:
        global_batch_size: Samples of one optimizer step, over all ranks.
        device_batch_size: Samples of one rank in a step.
        microbatch_size: Samples of one forward and backward pass on a rank.
        accumulation_steps: Passes before the optimizer's step; the last one may have fewer samples.
        device_eval_batch_size: Samples of one evaluation pass on a rank.
        notes: Lines to say before the run starts.
    """

    global_batch_size: int
    device_batch_size: int
    microbatch_size: int
    accumulation_steps: int
    device_eval_batch_size: int
    notes: tuple[str, ...] = ()


def batch_plan(recipe: "Recipe", world_size: int) -> BatchPlan:
    """Split the recipe's global batch over `world_size` ranks.

    Raises:
        UserError: The ranks do not divide the global batch; the message names sizes that work.
    """
    total, wanted = recipe.global_train_batch_size, recipe.device_train_microbatch_size
    if total % world_size:
        raise UserError(
            f"global_train_batch_size: {total} samples cannot be split over {world_size} ranks. "
            f"Next sizes that can: {_near(total, world_size)}; "
            f"or start one of these numbers of ranks: {_divisors(total, world_size)}."
        )
    device = total // world_size
    notes: tuple[str, ...] = ()
    microbatch = min(wanted, device)
    if wanted > device:
        notes = (
            f"device_train_microbatch_size: {wanted} is more than the {device} sample(s) of a rank "
            f"({total} / {world_size} ranks); using {device}.",
        )
    return BatchPlan(
        global_batch_size=total,
        device_batch_size=device,
        microbatch_size=microbatch,
        accumulation_steps=-(-device // microbatch),
        device_eval_batch_size=recipe.device_eval_batch_size or microbatch,
        notes=notes,
    )


def _near(total: int, world_size: int) -> str:
    below, above = total - total % world_size, total - total % world_size + world_size
    return " or ".join(str(size) for size in (below, above) if size > 0)


def _divisors(total: int, world_size: int) -> str:
    """Divisors of the batch around the number of ranks."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    nearest = sorted(divisors, key=lambda n: abs(n - world_size))[:4]
    return ", ".join(str(n) for n in sorted(nearest))
