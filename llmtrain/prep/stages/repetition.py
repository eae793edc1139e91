"""`repetition`: documents that repeat themselves, by the rules of Gopher (table A1)."""

import re
from collections.abc import Iterator

import numpy as np

from llmtrain.prep.stages.config import Repetition
from llmtrain.prep.stages.step import Drop, Step, Verdict
from llmtrain.prep.stages.words import WordHashes, n_grams

_PARAGRAPHS = re.compile(r"\n\s*\n")


def repetition(config: Repetition) -> Step:
    """Drops what breaks a rule; says which one, and by how much."""
    hashes = WordHashes()

    def judge(text: str) -> Verdict:
        for rule, value, limit in _measures(config, text, hashes):
            if value > limit:
                return Drop(rule, f"{value:.3g}")
        return None

    return judge


def _measures(config: Repetition, text: str, hashes: WordHashes) -> Iterator[tuple[str, float, float]]:
    """Rule, value, limit; computed one after another, the cheap ones first."""
    for unit, units in (("line", text.splitlines()), ("paragraph", _PARAGRAPHS.split(text))):
        share, share_of_chars = _duplicates(units)
        if (limit := getattr(config, f"max_duplicate_{unit}s")) is not None:
            yield f"duplicate {unit}s", share, limit
        if (limit := getattr(config, f"max_duplicate_{unit}_chars")) is not None:
            yield f"characters in duplicate {unit}s", share_of_chars, limit
    words = text.split()
    if not words:
        return
    hashed = hashes.of(words)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for n, limit in sorted(config.max_top_n_gram_chars.items()):
        yield f"characters in the top {n}-gram", _in_top_n_gram(n_grams(hashed, n), ends, n), limit
    for n, limit in sorted(config.max_duplicate_n_gram_chars.items()):
        yield f"characters in duplicate {n}-grams", _in_duplicate_n_grams(n_grams(hashed, n), lengths, n), limit


def _duplicates(units: list[str]) -> tuple[float, float]:
    """The share of units, and of characters in units, that occurred before; empty ones do not count."""
    seen = set()
    total = again = chars = again_chars = 0
    for unit in units:
        unit = unit.strip()
        if not unit:
            continue
        total += 1
        chars += len(unit)
        if unit in seen:
            again += 1
            again_chars += len(unit)
        seen.add(unit)
    return again / max(1, total), again_chars / max(1, chars)


def _in_top_n_gram(grams: np.ndarray, ends: np.ndarray, n: int) -> float:
    """The share of characters in the longest of the most frequent n-grams; 0 if none repeats."""
    if len(grams) == 0:
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    most = counts.max()
    if most == 1:
        return 0.0
    first = first[counts == most]
    return float(most * (ends[first + n] - ends[first]).max() / ends[-1])


def _in_duplicate_n_grams(grams: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The share of characters in words that an n-gram covers which occurred before; each word counts once."""
    if len(grams) == 0:
        return 0.0
    _, first, inverse = np.unique(grams, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(grams)))
    if len(again) == 0:
        return 0.0
    steps = np.zeros(len(lengths) + 1, np.int64)
    np.add.at(steps, again, 1)
    np.add.at(steps, again + n, -1)
    covered = np.cumsum(steps[:-1]) > 0
    return float(lengths[covered].sum() / lengths.sum())
