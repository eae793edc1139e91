"""Metrics over target tokens: cross-entropy, perplexity, accuracy.

Each is a ratio of two sums that are added over batches and ranks, so the value depends neither on the batch size nor on
the number of ranks. They read the sums that the model's chunked loss returns; no logits are kept.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from llmtrain.model.mpt import MPTOutput


class _PerToken(Metric):
    """A sum over target tokens divided by the number of target tokens."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(dist_sync_on_step=False)
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, output: MPTOutput) -> None:
        assert output.n_targets is not None
        self.total += self._sum_of(output).detach().to(self.total)
        self.count += output.n_targets.to(self.count)

    def compute(self) -> Tensor:
        return self.total / self.count.clamp(min=1)

    def _sum_of(self, output: MPTOutput) -> Tensor:
        raise NotImplementedError


class LanguageCrossEntropy(_PerToken):
    """Mean negative log-likelihood of the target tokens, in nats."""

    def _sum_of(self, output: MPTOutput) -> Tensor:
        assert output.loss_sum is not None
        return output.loss_sum


class LanguagePerplexity(LanguageCrossEntropy):
    """exp of the mean cross-entropy."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class TokenAccuracy(_PerToken):
    """Share of target tokens that the model ranks first."""

    def _sum_of(self, output: MPTOutput) -> Tensor:
        assert output.n_correct is not None
        return output.n_correct
