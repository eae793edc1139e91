"""Runs the micro-batches of a bad step again, to find the module where it began."""

from dataclasses import dataclass
from typing import Any

import torch
from composer import State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor, nn

from llmtrain.data.batch import sample_ids
from llmtrain.training import first_not_finite
from llmtrain.training.bad_step_report import Report

RNG = tuple[Tensor, Tensor | None]


@dataclass
class Seen:
    """A micro-batch of the step that is under way.

    Attributes:
        batch: as the model got it.
        rng: random state before its forward, of the CPU and of the GPU.
        loss: scalar, the mean over its targets.
        loss_sum: scalar, the sum.
        n_targets: scalar, how many there are.
    """

    batch: dict[str, Any]
    rng: RNG
    loss: Tensor
    loss_sum: Tensor
    n_targets: Tensor

    @classmethod
    def begin(cls, batch: dict[str, Any]) -> "Seen":
        """Before its forward."""
        nothing = torch.zeros(())
        return cls(dict(batch), random_state(), nothing, nothing, nothing)

    def end(self, loss: Tensor, outputs: Any) -> None:
        """After it."""
        self.loss = loss.detach()
        self.loss_sum, self.n_targets = outputs.loss_sum.detach().double(), outputs.n_targets.detach().double()

    def samples(self) -> list[list[int]]:
        """Ids of its samples, row by row."""
        return sample_ids(self.batch)


def random_state() -> RNG:
    """Of this rank."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: RNG) -> None:
    """The inverse."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def search(state: State, seen: list[Seen], report: Report, *, forward: bool) -> None:
    """Fills in what a report says about where it began. A collective call; gradients are gone afterwards.

    Args:
        state: Composer's.
        seen: this rank's micro-batches, as many on all ranks.
        report: its micro-batches are known.
        forward: a loss is not finite, so the forward pass of its micro-batch is enough.
    """
    before = random_state()
    numbers = [min(batch.number for batch in report.micro_batches)] if forward else range(1, len(seen) + 1)
    try:
        for number in numbers:
            report.searched = number
            report.culprits = _search_one(state, seen[number - 1], backward=not forward)
            if report.culprits:
                return
        report.searched = None
        report.search_note = (
            "running the same micro-batch again gave finite values: a fault that comes and goes "
            "(of the hardware, or of code that depends on more than weights, data and random state)"
        )
    except Exception as error:  # out of memory, a user's hook: the report is worth more than this part of it
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        report.search_note = f"the search for the first module failed: {type(error).__name__}: {first}"
    finally:
        for parameter in state.model.parameters():
            parameter.grad = None
        set_random_state(before)


def _search_one(state: State, seen: Seen, *, backward: bool) -> dict[int, first_not_finite.Culprit]:
    def loss_of(model: nn.Module) -> Tensor:
        batch = dict(seen.batch)
        with get_precision_context(state.precision, state.precision_config):
            loss: Tensor = model.loss(model(batch), batch)  # type: ignore[operator]
        return loss

    set_random_state(seen.rng)
    found = first_not_finite.search(state.model, loss_of, backward=backward)
    by_rank = dist.all_gather_object(found)
    if backward and not any(by_rank):
        by_rank = dist.all_gather_object(first_not_finite.weight_with_bad_gradient(state.model))
    return {rank: culprit for rank, culprit in enumerate(by_rank) if culprit is not None}
