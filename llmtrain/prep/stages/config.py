"""What `stages` of a data recipe may say: quality steps, carried out in the order in which they are written."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config

Function = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""`package.module:function`; a module beside the folder that the command runs in is found, too."""


class Stage(Config):
    """What every stage has."""

    samples: int = Field(default=5, ge=0)
    """How many of the documents that it drops or changes are shown in `prep.json`: the first ones."""


class _Dedup(Stage):
    within: Literal["all", "source"] = "all"
    """Compare documents of all sources, or only those of one source."""


class ExactDedup(_Dedup):
    """Drops documents whose text occurred before. The first one, in the order of sources and files, stays."""

    name: Literal["exact_dedup"]
    """Which stage this is."""
    ignore: list[Literal["case", "whitespace"]] = Field(default_factory=list)
    """What makes no difference: upper and lower case; how much white space there is, and of which kind."""


class MinHashDedup(_Dedup):
    """Drops near copies of documents that came before, found by MinHash signatures and locality-sensitive hashing.

    Two documents whose sets of n-grams have the Jaccard similarity s become candidates, and so copies, with the
    probability 1 - (1 - s^hashes_per_bucket)^num_buckets. Copies of copies make one cluster; its first document stays.
    """

    name: Literal["minhash_dedup"]
    """Which stage this is."""
    n_grams: int = Field(default=5, ge=1, le=32)
    """Words in an n-gram. A document of fewer words is one n-gram; one without words is never a copy."""
    num_buckets: int = Field(default=14, ge=1, le=256)
    """Buckets (bands); documents that agree in one of them are copies."""
    hashes_per_bucket: int = Field(default=8, ge=1, le=64)
    """Hashes (rows) that must agree in a bucket."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Chooses the hash functions."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.num_buckets * self.hashes_per_bucket > 4096:
            raise ValueError("num_buckets * hashes_per_bucket is above 4096 hashes for each n-gram")
        return self

    def probability(self, similarity: float) -> float:
        """How probable it is that a pair of this Jaccard similarity is found."""
        return float(1 - (1 - similarity**self.hashes_per_bucket) ** self.num_buckets)

    def threshold(self) -> float:
        """The similarity at which half of the pairs are found."""
        return float((1 - 0.5 ** (1 / self.num_buckets)) ** (1 / self.hashes_per_bucket))


class Length(Stage):
    """Drops documents outside of bounds (inclusive). A word is what stands between white space."""

    name: Literal["length"]
    """Which stage this is."""
    min_chars: int | None = Field(default=None, ge=0)
    """Fewest characters."""
    max_chars: int | None = Field(default=None, ge=0)
    """Most characters."""
    min_words: int | None = Field(default=None, ge=0)
    """Fewest words; Gopher has 50."""
    max_words: int | None = Field(default=None, ge=0)
    """Most words; Gopher has 100,000."""
    min_mean_word_length: float | None = Field(default=None, ge=0)
    """Smallest mean length of a word in characters; Gopher has 3."""
    max_mean_word_length: float | None = Field(default=None, ge=0)
    """Largest mean length of a word in characters; Gopher has 10."""

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        bounds = ("chars", "words", "mean_word_length")
        given = {bound: (getattr(self, f"min_{bound}"), getattr(self, f"max_{bound}")) for bound in bounds}
        if all(low is None and high is None for low, high in given.values()):
            raise ValueError("give at least one bound, for example min_words")
        for bound, (low, high) in given.items():
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{bound} {low:g} is above max_{bound} {high:g}: no document could pass")
        return self


class SymbolRatio(Stage):
    """Drops documents with too many symbols and too few words, by the rules of Gopher; null turns a rule off.

    Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A1.1 ("Quality Filtering").
    """

    name: Literal["symbol_ratio"]
    """Which stage this is."""
    max_symbols_per_word: float | None = Field(default=0.1, ge=0)
    """Most `#` per word, and most ellipses (`...`, `…`) per word."""
    max_bullet_lines: float | None = Field(default=0.9, ge=0, le=1)
    """Largest share of lines that begin with a bullet (`-`, `*`, `•`, `‣`, `◦`)."""
    max_ellipsis_lines: float | None = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float | None = Field(default=0.8, ge=0, le=1)
    """Smallest share of words with a letter in them."""
    min_stop_words: int | None = Field(default=None, ge=0)
    """How many of the words the, be, to, of, and, that, have, with must occur; Gopher has 2. For English alone."""
    max_digit_chars: float | None = Field(default=None, ge=0, le=1)
    """Largest share of digits among the characters that are not white space. Not one of Gopher's rules."""


class Repetition(Stage):
    """Drops documents that repeat themselves, by the rules and thresholds of Gopher; null turns a rule off.

    Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1. Shares of characters are without white space.
    """

    name: Literal["repetition"]
    """Which stage this is."""
    max_duplicate_lines: float | None = Field(default=0.3, ge=0, le=1)
    """Largest share of lines that occurred before."""
    max_duplicate_paragraphs: float | None = Field(default=0.3, ge=0, le=1)
    """Largest share of paragraphs (between empty lines) that occurred before."""
    max_duplicate_line_chars: float | None = Field(default=0.2, ge=0, le=1)
    """Largest share of characters in lines that occurred before."""
    max_duplicate_paragraph_chars: float | None = Field(default=0.2, ge=0, le=1)
    """Largest share of characters in paragraphs that occurred before."""
    max_top_n_gram_chars: dict[int, float] = Field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    """n -> largest share of characters in the most frequent n-gram of words."""
    max_duplicate_n_gram_chars: dict[int, float] = Field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    """n -> largest share of characters in n-grams of words that occurred before."""


class Language(Stage):
    """Keeps documents of some languages, as a function of the user's says."""

    name: Literal["language"]
    """Which stage this is."""
    function: Function
    """`package.module:function`: takes the text; returns the language, (language, score), or whether to keep it."""
    languages: list[str] = Field(default_factory=list)
    """Languages to keep, as the function names them. Not for a function that returns true or false."""
    min_score: float = 0.0
    """Drop documents below this score."""


class UserFunction(Stage):
    """Drops or changes documents as a function of the user's says."""

    name: Literal["function"]
    """Which stage this is."""
    function: Function
    """`package.module:function`: takes the text; returns true to keep, false to drop, or another text. Its result must
    depend on the text alone: it is called again when work is repeated."""


class Regex(Stage):
    """Drops documents by patterns, or replaces what matches."""

    name: Literal["regex"]
    """Which stage this is."""
    patterns: list[str] = Field(min_length=1)
    """Python regular expressions, searched anywhere; `(?i)`, `(?m)` and other flags at the beginning of a pattern."""
    action: Literal["drop", "keep", "replace"]
    """`drop` documents in which a pattern is found, `keep` only those, or `replace` what is found."""
    replacement: str = ""
    """With `action: replace`; `\\1` stands for a group."""

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as problem:
                raise ValueError(f"{pattern!r} is no regular expression: {problem}") from None
        return patterns

    @model_validator(mode="after")
    def _replacement_fits(self) -> Self:
        if self.action != "replace" and self.replacement:
            raise ValueError("replacement needs action: replace")
        for pattern in self.patterns if self.action == "replace" else ():
            try:
                re.compile(pattern).sub(self.replacement, "")
            except (re.error, IndexError) as problem:
                raise ValueError(f"replacement {self.replacement!r} of {pattern!r}: {problem}") from None
        return self


class Pii(Stage):
    """Replaces what looks like personal data by placeholders that are the same everywhere."""

    name: Literal["pii"]
    """Which stage this is."""
    kinds: list[Literal["email", "ip", "phone"]] = Field(default_factory=lambda: ["email", "ip"], min_length=1)  # type: ignore[arg-type]
    """What to look for. `ip`: global IPv4 and IPv6 addresses; private and reserved ones stay. `phone`: international
    (`+49 30 1234567`) and North American numbers; no pattern tells a number of another kind from it in every case."""
    email: str = "<EMAIL>"
    """Placeholder for e-mail addresses."""
    ip: str = "<IP>"
    """Placeholder for IP addresses."""
    phone: str = "<PHONE>"
    """Placeholder for telephone numbers."""


class Decontaminate(Stage):
    """Drops documents that share n-grams of words with evaluation items.

    Words and n as in GPT-3: lower case, without punctuation, 13 words (Brown et al. 2020,
    https://arxiv.org/abs/2005.14165, appendix C).
    """

    name: Literal["decontaminate"]
    """Which stage this is."""
    files: list[str] = Field(min_length=1)
    """Paths and globs of evaluation files. `.jsonl`, `.json`: each line is an item; others: the file is one item. `.gz`
    and `.zst` are decompressed."""
    columns: list[str] | None = None
    """Keys whose texts make up an item; null takes all texts in it, each by itself."""
    n_grams: int = Field(default=13, ge=2, le=64)
    """Words in an n-gram."""
    min_item_words: int = Field(default=8, ge=1)
    """A shorter text of an item (fewer than `n_grams` words) is looked for as a whole; below this it is left out."""
    min_matches: int = Field(default=1, ge=1)
    """How many different n-grams of the evaluation files a document must hold to be dropped."""


class DatatroveFilter(Stage):
    """Any filter of datatrove, an optional dependency (`pip install llmtrain[quality]`)."""

    name: Literal["datatrove"]
    """Which stage this is."""
    filter: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """Class in `datatrove.pipeline.filters`: `GopherQualityFilter`, `FineWebQualityFilter`, `C4QualityFilter`, ..."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the class."""


StageConfig = Annotated[
    ExactDedup
    | MinHashDedup
    | Length
    | SymbolRatio
    | Repetition
    | Language
    | UserFunction
    | Regex
    | Pii
    | Decontaminate
    | DatatroveFilter,
    Field(discriminator="name"),
]
