"""`symbol_ratio`: symbols, bullets, ellipses and words without letters, by the rules of Gopher."""

import re
from collections.abc import Iterator

from llmtrain.prep.stages.config import SymbolRatio
from llmtrain.prep.stages.step import Drop, Step, Verdict

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("-", "*", "•", "‣", "◦")
_ELLIPSES = ("...", "…")
_LETTER = re.compile(r"[^\W\d_]")
_DIGIT = re.compile(r"\d")


def symbol_ratio(config: SymbolRatio) -> Step:
    """Drops what breaks a rule; says which one, and by how much. A document without words breaks none."""

    def judge(text: str) -> Verdict:
        words = text.split()
        if not words:
            return None
        for rule, value, limit, too_much in _measures(config, text, words):
            if value > limit if too_much else value < limit:
                return Drop(rule, f"{value:.3g}")
        return None

    return judge


def _measures(config: SymbolRatio, text: str, words: list[str]) -> Iterator[tuple[str, float, float, bool]]:
    """Rule, value, limit, whether the limit is the most; computed one after another, the cheap ones first."""
    if (limit := config.max_symbols_per_word) is not None:
        yield "hashes per word", text.count("#") / len(words), limit, True
        yield "ellipses per word", sum(map(text.count, _ELLIPSES)) / len(words), limit, True
    if config.max_bullet_lines is not None or config.max_ellipsis_lines is not None:
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if (limit := config.max_bullet_lines) is not None:
            yield "bullet lines", sum(line.startswith(_BULLETS) for line in lines) / len(lines), limit, True
        if (limit := config.max_ellipsis_lines) is not None:
            yield "ellipsis lines", sum(line.endswith(_ELLIPSES) for line in lines) / len(lines), limit, True
    if (limit := config.min_alphabetic_words) is not None:
        alphabetic = sum(1 for word in words if word.isalpha() or _LETTER.search(word))
        yield "alphabetic words", alphabetic / len(words), limit, False
    if (fewest := config.min_stop_words) is not None:
        yield "stop words", len(_STOP_WORDS.intersection(map(str.lower, words))), fewest, False
    if (limit := config.max_digit_chars) is not None:
        yield "digits", len(_DIGIT.findall(text)) / sum(map(len, words)), limit, True
