"""Generated answers: where they end, and whether they are right."""

import re
import string
from collections.abc import Iterable, Sequence

_PUNCTUATION = frozenset(string.punctuation + "‘’´`")


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks: TriviaQA's rule, which llm-foundry takes."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", _plain(text)).split())


def _plain(text: str) -> str:
    return "".join(" " if sign in _PUNCTUATION else sign for sign in text.replace("_", " ").lower())


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
    if normalize:
        return any(_begins(text, answer) for answer in answers)
    return any(text.strip().startswith(answer.strip()) for answer in answers)


def _begins(text: str, answer: str) -> bool:
    if wanted := normalized(answer):
        return normalized(text).startswith(wanted)
    # An article is all there is ("A", of a question with letters): nothing would be left, with which all texts begin.
    words = _plain(answer).split()
    return bool(words) and _plain(text).split()[: len(words)] == words
