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
        device_batch_size: Samples of one rank in a step; ranks that share sequences have the same ones.
        microbatch_size: Samples of one forward and backward pass on a rank.
        accumulation_steps: Passes before the optimizer's step; the last one may have fewer samples.
        device_eval_batch_size: Samples of one evaluation pass on a rank.
        sequence_parallel_degree: Consecutive ranks that share each sample.
        notes: Lines to say before the run starts.
    """

    global_batch_size: int
    device_batch_size: int
    microbatch_size: int
    accumulation_steps: int
    device_eval_batch_size: int
    sequence_parallel_degree: int = 1
    notes: tuple[str, ...] = ()


def batch_plan(recipe: "Recipe", world_size: int) -> BatchPlan:
    """Split the recipe's global batch over `world_size` ranks.

    Raises:
        UserError: The ranks do not divide the global batch; the message names sizes that work. Or they are no
            multiple of the ranks that share a sequence.
    """
    total, wanted = recipe.global_train_batch_size, recipe.device_train_microbatch_size
    degree = recipe.sequence_parallel_degree
    if world_size % degree:
        raise UserError(
            f"sequence_parallel_degree: {world_size} ranks cannot be grouped by {degree}. Start a multiple of it, "
            f"or choose a divisor of {world_size}."
        )
    groups = world_size // degree
    if total % groups:
        who = f"{groups} ranks" if degree == 1 else f"{groups} groups of {degree} ranks"
        numbers = ", ".join(str(n * degree) for n in _divisors(total, groups))
        raise UserError(
            f"global_train_batch_size: {total} samples cannot be split over {who}. "
            f"Next sizes that can: {_near(total, groups)}; "
            f"or start one of these numbers of ranks: {numbers}."
        )
    device = total // groups
    notes: tuple[str, ...] = ()
    microbatch = min(wanted, device)
    if wanted > device:
        notes = (
            f"device_train_microbatch_size: {wanted} is more than the {device} sample(s) of a rank "
            f"({total} / {groups} {'ranks' if degree == 1 else 'groups of ranks'}); using {device}.",
        )
    return BatchPlan(
        global_batch_size=total,
        device_batch_size=device,
        microbatch_size=microbatch,
        accumulation_steps=-(-device // microbatch),
        device_eval_batch_size=recipe.device_eval_batch_size or microbatch,
        sequence_parallel_degree=degree,
        notes=notes,
    )


def _near(total: int, groups: int) -> str:
    below, above = total - total % groups, total - total % groups + groups
    return " or ".join(str(size) for size in (below, above) if size > 0)


def _divisors(total: int, groups: int) -> list[int]:
    """Divisors of the batch around the number of groups."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    return sorted(sorted(divisors, key=lambda n: abs(n - groups))[:4])
