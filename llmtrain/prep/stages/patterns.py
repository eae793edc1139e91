"""`regex`: documents are dropped by patterns, or what matches is replaced."""

import re

from llmtrain.prep.stages.config import Regex
from llmtrain.prep.stages.step import Change, Drop, Step, Verdict, around


def regex(config: Regex) -> Step:
    """Drops or changes documents by the patterns, one after another."""
    patterns = [re.compile(pattern) for pattern in config.patterns]

    def drop(text: str) -> Verdict:
        for pattern in patterns:
            if match := pattern.search(text):
                return Drop(pattern.pattern, excerpt=around(text, *match.span()))
        return None

    def keep(text: str) -> Verdict:
        return None if any(pattern.search(text) for pattern in patterns) else Drop("no pattern is found")

    def replace(text: str) -> Verdict:
        counts: dict[str, int] = {}
        excerpt, changed = "", text
        for pattern in patterns:
            first = pattern.search(changed)
            if first is None:
                continue
            excerpt = excerpt or around(changed, *first.span())
            changed, counts[pattern.pattern] = pattern.subn(config.replacement, changed)
        return Change(changed, counts, excerpt) if changed != text else None

    return {"drop": drop, "keep": keep, "replace": replace}[config.action]
