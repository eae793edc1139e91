"""Texts as arrays of hashed words, and n-grams of them: what near copies and contamination are found by."""

import re

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts written without spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese): each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[^\\W_{_UNSPACED}]+|[{_UNSPACED}]")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
# The same for ASCII, three times as fast.
_APART = {code: " " for code in range(128) if not chr(code).isalnum()}
_JOINED = {code: " " if chr(code).isspace() else None for code in _APART}
_MOST_WORDS = 1 << 20  # kept with their hashes

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def words(text: str, *, joined: bool = False) -> list[str]:
    """The words of a text in lower case, without punctuation.

    Args:
        text: any.
        joined: `don't` is `dont`, as in GPT-3's decontamination; otherwise `don` and `t`.
    """
    text = text.lower()
    if text.isascii():
        return text.translate(_JOINED if joined else _APART).split()
    return _WORD.findall(_PUNCTUATION.sub("", text) if joined else text)


class WordHashes(dict[str, int]):
    """Word -> its hash (xxh3, 64 bits), computed once for words that come often."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_WORDS:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return value

    def of(self, some_words: list[str]) -> Hashes:
        """The hashes of words, in their order."""
        return np.fromiter(map(self.__getitem__, some_words), np.uint64, len(some_words))


def n_grams(hashes: Hashes, n: int) -> Hashes:
    """The hashes of all n-grams of words, in their order, mixed well; empty when there are fewer than n words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return hashes[:0]
    made = np.zeros(count, np.uint64)
    for k in range(n):
        made *= _MULTIPLIER
        made += hashes[k : k + count]
    return mixed(made)


def mixed(values: Hashes) -> Hashes:
    """Values whose every bit depends on all bits of the given ones (xmx, a bijection). Changes them in place."""
    values ^= values >> _HALF
    values *= _MIX
    values ^= values >> _HALF
    values *= _MIX
    values ^= values >> _HALF
    return values
