"""Long documents in parts: where a text can be cut so that its ids stay what they are.

What cuts a text into words before merging (a byte-level tokenizer's pattern, white space, punctuation) sees a letter
and then a space and a letter as the end of one word and the beginning of the next, whatever stands around them. Readers
cut there without knowing the tokenizer (`fragments`); `Parts`, which knows it, tries each cut out and moves it where
the ids would change.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

LONG = 1 << 18
"""Characters; a longer document comes in parts of about this size: `tokenizers` takes 130 bytes for a character."""
_HARD = 8 * LONG
"""Characters after which a text without any place to cut is cut all the same."""

_LETTER = r"[^\W_]"  # or a digit
# Between words of a line; between lines; and for scripts without spaces, before punctuation that composes with nothing.
_PLACE = re.compile(rf"(?<={_LETTER})(?=[ \n]{_LETTER}|[，。、；：？！」』）।])")
_CONTEXT = 1_000  # characters on either side of a cut that are encoded to try it out
_REACH = 1 << 15  # characters from the end in which places are looked for
_TRIES = 8


def fragments(chunks: Iterable[str]) -> Iterator[str]:
    """A stream of text in parts of about `LONG` characters, cut between words; where the chunks end plays no part.

    The parts joined are the text. A text shorter than that is one part, as an empty text is.

    Args:
        chunks: The text, in pieces of any size.
    """
    waiting: list[str] = []
    n_waiting = searched = 0
    for chunk in chunks:
        waiting.append(chunk)
        n_waiting += len(chunk)
        if n_waiting < max(2 * LONG, searched + LONG):
            continue
        text = "".join(waiting)
        while len(text) >= 2 * LONG:
            # A place needs two characters behind it, and a search that found none goes on where it ended.
            stop = min(len(text), _HARD)
            found = _PLACE.search(text, max(LONG, searched), stop)
            if found is None and len(text) <= _HARD:
                searched = stop - 2
                break
            cut = found.start() if found else _before_marks(text, _HARD)
            yield text[:cut]
            text, searched = text[cut:], 0
        waiting, n_waiting = [text], len(text)
    yield "".join(waiting)


class Parts:
    """Takes the parts of long documents, and gives what can be encoded of each on its own.

    Args:
        encode: text -> ids, (n,).
    """

    def __init__(self, encode: Callable[[str], NDArray[np.unsignedinteger]]) -> None:
        self._encode = encode
        self._kept = ""
        self.hard_cuts = 0
        """Cuts where the ids may not be those of the whole text, because no place was found for so long."""

    def start(self) -> None:
        """Forget what was kept: a new document begins."""
        self._kept = ""

    def add(self, text: str, *, last: bool) -> str:
        """What to encode after this part; the end of a part that is not the last is kept for the next one."""
        text, self._kept = self._kept + text, ""
        if last:
            return text
        cut = self._cut(text)
        if cut is None:
            if len(text) < _HARD:
                self._kept = text
                return ""
            self.hard_cuts += 1
            cut = _before_marks(text, len(text) - _CONTEXT)
        self._kept = text[cut:]
        return text[:cut]

    def _cut(self, text: str) -> int | None:
        """The last place in a text, if one can be found, where it may be cut."""
        begin = max(_CONTEXT, len(text) - _REACH)
        places = [found.start() for found in _PLACE.finditer(text, begin, max(begin, len(text) - _CONTEXT))]
        return next((place for place in islice(reversed(places), _TRIES) if self._holds(text, place)), None)

    def _holds(self, text: str, place: int) -> bool:
        left, right = text[place - _CONTEXT : place], text[place : place + _CONTEXT]
        return np.array_equal(self._encode(left + right), np.concatenate([self._encode(left), self._encode(right)]))


def _before_marks(text: str, place: int) -> int:
    """The last place up to this one that does not part a character from the marks that compose with it."""
    while place > 1 and unicodedata.combining(text[place]):
        place -= 1
    return place
