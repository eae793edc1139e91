"""Loss of each source of a mixture: the mean of all says little about any of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.data.batch import IGNORE


class SourceLoss(NamedTuple):
    """What was measured on one source."""

    loss: float
    """Mean loss of its targets, in nats."""
    targets: int
    """How many they are, at least 1."""


class LossBySource:
    """Sums of losses and numbers of targets for each source, in float64, so that batches and ranks add up.

    Args:
        names: of the sources.
        device: where the sums are kept.

    Attributes:
        sums: (2, sources): losses, and targets.
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)

    def add(self, token_losses: Tensor, labels: Tensor, source: Tensor) -> None:
        """Count a batch.

        Args:
            token_losses: (batch, T), at t the loss of predicting token t + 1, as `MPTOutput.token_losses`.
            labels: (batch, T) int64, not shifted, IGNORE where a token is no target.
            source: (batch,) int64, the number of each row's source.
        """
        counted = labels[:, 1:] != IGNORE
        losses = token_losses[:, :-1].double() * counted
        self.sums[0].index_add_(0, source, losses.sum(1))
        self.sums[1].index_add_(0, source, counted.sum(1).double())

    def results(self) -> dict[str, SourceLoss]:
        """By name; without sources that had no target."""
        losses, targets = self.sums.tolist()
        found = zip(self.names, losses, targets, strict=True)
        return {name: SourceLoss(loss / n, int(n)) for name, loss, n in found if n}
