"""Loss as a function of position: how much a model makes of a longer context."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.data.batch import IGNORE


@dataclass(frozen=True)
class Bin:
    """Some neighbouring positions. The position of a target is the number of tokens that the model saw before it."""

    first: int
    """Smallest position, at least 1."""
    last: int
    """Largest position."""
    loss: float
    """Mean loss of the targets there, in nats."""
    targets: int
    """How many they are, at least 1."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class LossByPosition:
    """Sums of losses and numbers of targets for each position, in float64, so that batches and ranks add up.

    Args:
        device: where the sums are kept.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        self.counts = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, token_losses: Tensor, labels: Tensor, positions: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            token_losses: (batch, T), at t the loss of predicting token t + 1, as `MPTOutput.token_losses`.
            labels: (batch, T) int64, not shifted, IGNORE where a token is no target.
            positions: (batch, T) int64, the position of each token in its own document; its index when left out.
        """
        counted = labels[:, 1:] != IGNORE
        losses = token_losses[:, :-1].double() * counted
        self._grow(labels.shape[1])
        if positions is None:
            self.sums[1 : labels.shape[1]] += losses.sum(0)
            self.counts[1 : labels.shape[1]] += counted.sum(0)
        else:
            self.sums.index_add_(0, positions[:, 1:].flatten(), losses.flatten())
            self.counts.index_add_(0, positions[:, 1:].flatten(), counted.double().flatten())

    def merge(self, sums: Tensor, counts: Tensor) -> None:
        """Add what another one has."""
        self._grow(len(sums))
        self.sums[: len(sums)] += sums
        self.counts[: len(counts)] += counts

    def over_ranks(self, add_up: Callable[[Tensor], Tensor], length: int) -> "LossByPosition":
        """What all ranks have together, on the CPU (a collective call).

        Args:
            add_up: elementwise sum over ranks.
            length: of the longest window of any of them.
        """
        self._grow(length)
        whole = LossByPosition()
        whole.sums, whole.counts = add_up(self.sums), add_up(self.counts)
        return whole

    @property
    def targets(self) -> int:
        """Targets so far."""
        return int(self.counts.sum())

    @property
    def loss(self) -> float:
        """Mean loss of all targets, in nats; 0 without any."""
        return float(self.sums.sum() / self.counts.sum().clamp(min=1))

    def curve(self, *, per_octave: int = 4, least: int | None = None) -> list[Bin]:
        """Bins of equal width on a logarithmic axis; a bin with few targets is joined with the next ones.

        Args:
            per_octave: bins to a doubling of the position.
            least: targets that a bin has (but the last, which may have to be joined with the one before it);
                one in 500, and no fewer than 64, when left out.
        """
        least = max(64, self.targets // 500) if least is None else least
        length = len(self.sums)
        octaves = np.arange(int(np.log2(max(length, 2)) * per_octave) + 1)
        edges = np.unique(np.append(np.floor(2 ** (octaves / per_octave)).astype(np.int64), max(length, 2)))
        counts = self.counts.cpu().numpy()
        kept = [1]
        for edge in edges[1:]:
            if counts[kept[-1] : edge].sum() >= least:
                kept.append(int(edge))
        if kept[-1] < length:  # too few are left
            kept[-1 if len(kept) > 1 else len(kept) :] = [length]
        return self.bins(np.array(kept))

    def bins(self, edges: NDArray[np.int64]) -> list[Bin]:
        """Means between edges, of the bins that have a target.

        Args:
            edges: positions, increasing: bin k holds edges[k] <= position < edges[k + 1].
        """
        sums, counts = self.sums.cpu().numpy(), self.counts.cpu().numpy()
        found = []
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            n = counts[first:end].sum()
            if n:
                found.append(Bin(first, min(end, len(counts)) - 1, float(sums[first:end].sum() / n), int(n)))
        return found

    def octaves(self, first: int = 64) -> list[Bin]:
        """Bins with the same edges in each evaluation of a run: 1 to `first` - 1, then doublings."""
        edges = [1, first]
        while edges[-1] < len(self.sums):
            edges.append(edges[-1] * 2)
        return self.bins(np.array(edges))

    def _grow(self, length: int) -> None:
        more = length - len(self.sums)
        if more > 0:
            self.sums = torch.cat([self.sums, self.sums.new_zeros(more)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
