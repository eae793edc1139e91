"""`length`: bounds on characters, words and the mean length of a word."""

from llmtrain.prep.stages.config import Length
from llmtrain.prep.stages.step import Drop, Step, Verdict


def length(config: Length) -> Step:
    """Drops what is out of bounds."""
    bounds = [
        (what, low, high)
        for what in ("chars", "words", "mean_word_length")
        for low, high in [(getattr(config, f"min_{what}"), getattr(config, f"max_{what}"))]
        if low is not None or high is not None
    ]
    needs_words = any(what != "chars" for what, _, _ in bounds)

    def judge(text: str) -> Verdict:
        words = text.split() if needs_words else []
        measures: dict[str, float] = {"chars": len(text), "words": len(words)}
        measures["mean_word_length"] = sum(map(len, words)) / max(1, len(words))
        for what, low, high in bounds:
            value = measures[what]
            if low is not None and value < low:
                return Drop(f"below min_{what}", f"{value:,.4g} {what}" if value % 1 else f"{value:,.0f} {what}")
            if high is not None and value > high:
                return Drop(f"above max_{what}", f"{value:,.4g} {what}" if value % 1 else f"{value:,.0f} {what}")
        return None

    return judge
