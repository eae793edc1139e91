"""Generated answers: where they end, and whether they are right."""

import re
import string
from collections.abc import Iterable, Sequence

_PUNCTUATION = frozenset(string.punctuation + "‘’´`")


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks: TriviaQA's rule, which llm-foundry takes."""
    text = "".join(" " if sign in _PUNCTUATION else sign for sign in text.replace("_", " ").lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def is_right(
    generated: str, answers: Iterable[str], *, stops: Sequence[str], cot_delimiter: str, normalize: bool
) -> bool:
    """Whether a generated text begins with one of the answers.

    Args:
        generated: by the model.
        answers: the answer and its aliases.
        stops: the answer ends before the first of these.
        cot_delimiter: what stands before the last of these is thought, no answer.
        normalize: compare `normalized` texts. Otherwise only the blanks around them do not count. (llm-foundry counts
            a blank before a generated word, with which no answer of a file begins, so that nothing is ever right.)
    """
    text = cut(generated, stops)
    if cot_delimiter:
        text = text.split(cot_delimiter)[-1]
    clean = normalized if normalize else str.strip
    text = clean(text)
    # An answer of which nothing is left ("The") is no beginning of everything.
    return any(text.startswith(wanted) if wanted else text == wanted for wanted in map(clean, answers))
