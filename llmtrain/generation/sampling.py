"""From logits to the next token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the steps are taken in the order of the fields, as transformers does."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token always (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities add up to at least this (nucleus sampling,
    Holtzman et al. 2020, arXiv:1904.09751); 1 keeps all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number.")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (all tokens) or positive.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1.")

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0 or self.top_k == 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the next token is drawn from: (batch, vocab) logits -> (batch, vocab) float32 that sum to 1."""
        logits = logits.float()
        if self.greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k).indices
            logits = torch.full_like(logits, float("-inf")).scatter_(-1, kept, logits.gather(-1, kept))
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            # A token goes when those before it are enough already; so the first one always stays.
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            ordered[..., 0] = ordered[..., 0].clamp(min=torch.finfo(ordered.dtype).tiny)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
            probabilities /= probabilities.sum(-1, keepdim=True)
        return probabilities

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Choose one token a row: (batch, vocab) logits and a generator for each row -> (batch,) int64."""
        if self.greedy:
            return logits.argmax(-1)
        # On the CPU, where the generators are: the same seed draws the same on every device.
        probabilities = self.probabilities(logits).cpu()
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
        return torch.cat(drawn).to(logits.device)


GREEDY = Sampling(temperature=0)


def draw(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of rows that are sampled in different ways: (batch, vocab) logits -> (batch,) int64."""
    kinds = set(samplings)
    if len(kinds) == 1:
        return samplings[0].draw(logits, generators)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for kind in kinds:
        rows = [row for row, sampling in enumerate(samplings) if sampling == kind]
        tokens[rows] = kind.draw(logits[rows], [generators[row] for row in rows])
    return tokens
