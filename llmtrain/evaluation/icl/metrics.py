"""Metrics over questions. Formulas and names are llm-foundry's."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

N_BUCKETS = 10


@dataclass(frozen=True)
class Scored:
    """What the model makes of one pair of context and continuation."""

    loss: float
    """Mean of -log p over the tokens of the continuation."""
    probability: float
    """Mean of p over them."""
    greedy: bool
    """Whether each of them has the largest logit."""
    confidence: float | None = None
    """The smallest of the largest probabilities; None unless asked for."""


@dataclass(frozen=True)
class Outcome:
    """Of one question."""

    right: bool
    sure_of: bool = False
    """Whether what the model was surest of is right."""
    confidence: float = 0.0
    """How sure, 0 to 1."""
    answer: str | int | None = None
    """What it chose (the number of the choice) or wrote."""


def of_language_modeling(scored: Sequence[Scored]) -> Outcome:
    """Right when every token would have been written; as sure as of the least sure token."""
    (one,) = scored
    return Outcome(one.greedy, one.greedy, 0.0 if one.confidence is None else one.confidence)


def of_choices(scored: Sequence[Scored], gold: int) -> Outcome:
    """The choice with the lowest perplexity per token; the first one of several.

    Confidence is that of arXiv:2012.00955 as llm-foundry computes it: the largest mean probability of a choice's tokens
    over the sum of all choices'. That choice need not be the one of the lowest perplexity.
    """
    losses, probabilities = [one.loss for one in scored], [one.probability for one in scored]
    chosen, sure = losses.index(min(losses)), probabilities.index(max(probabilities))
    total = sum(probabilities)
    confidence = probabilities[sure] / total if total > 0 else 1 / len(scored)
    return Outcome(chosen == gold, sure == gold, confidence, chosen)


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """Share of questions that are right."""
    return sum(outcome.right for outcome in outcomes) / len(outcomes)


def standard_error(outcomes: Sequence[Outcome]) -> float | None:
    """Of the accuracy: sqrt(p (1 - p) / (n - 1)); None for a single question."""
    n, p = len(outcomes), accuracy(outcomes)
    return sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def calibration_error(outcomes: Sequence[Outcome]) -> float:
    """Expected calibration error (arXiv:1706.04599): gaps between accuracy and confidence in ten buckets, weighted.

    A bucket's confidence is its middle.
    """
    totals, correct = [0] * N_BUCKETS, [0] * N_BUCKETS
    for outcome in outcomes:
        bucket = min(int(outcome.confidence * N_BUCKETS), N_BUCKETS - 1)
        totals[bucket] += 1
        correct[bucket] += outcome.sure_of
    error = 0.0
    for bucket, total in enumerate(totals):
        if total:
            error += total / len(outcomes) * abs(correct[bucket] / total - (bucket + 0.5) / N_BUCKETS)
    return error
