"""A stream of tokens cut into windows of one length, so that the same tokens are predicted whatever the length is."""

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Some consecutive tokens of one piece of text: the model reads them, and predicts all of them but the first."""

    piece: int
    """Number of the piece."""
    start: int
    """Its first token, from 0 in the piece."""
    stop: int
    """One behind its last token."""

    @property
    def length(self) -> int:
        """Tokens in it, at least 2."""
        return self.stop - self.start


def windows(pieces: Sequence[int], length: int) -> list[Window]:
    """Cut pieces of text into windows of at most `length` tokens.

    A window begins with the last token of the one before it, which that one has predicted: so each token of a piece but
    the first is predicted exactly once, and losses at several lengths are of the same tokens.

    Args:
        pieces: tokens in each piece; what is in one was written as one text, or as texts joined end to end.
        length: at least 2.
    """
    return [
        Window(number, start, min(start + length, size))
        for number, size in enumerate(pieces)
        for start in range(0, size - 1, length - 1)
    ]


def at_most(pieces: Sequence[int], n_tokens: int | None) -> list[int]:
    """The first `n_tokens` tokens of pieces, in their order; None is all of them."""
    if n_tokens is None:
        return list(pieces)
    kept = []
    for size in pieces:
        if n_tokens < 2:
            break
        kept.append(min(size, n_tokens))
        n_tokens -= size
    return kept
