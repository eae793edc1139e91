"""Byte-level BPE through tiktoken's Rust core: the ids of `tokenizers`, several times cheaper.

Both libraries merge the pair of least rank first; what differs is bookkeeping (`tokenizers` keeps offsets, normalised
text and a cache, and hands out Python lists). `open_fast` translates a tokenizer where that can be done exactly, and
checks the translation before anyone uses it. Imports neither torch nor transformers.
"""

import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2, and `ByteLevel` in `tokenizers`, cuts text before merging."""

# Where the two libraries' regular expressions may differ: white space of every kind, letters, numbers and marks of
# several scripts, contractions, control characters, ends of lines, emoji, runs of spaces as long as any added token.
_SAMPLE = (
    "",
    " ",
    "It's we'll THEY'RE I'd you've 'tis don't\tDON'T",
    "def f(x):\n    return x ** 2  # naïve\r\n\r\n\t\tpass\n\n\n",
    "1234567890 3.14159 1,000,000 ⅻ ² ٣٤ 一二三 x1y2",
    "ünïcödé Straße ΑΒΓ ёж 漢字かな交じり文 한국어 العربية हिन्दी ไทย",
    "e\u0301 \u1e69 s\u0323\u0307 \ufb01 \u212b \u00a0\u2003\u3000\u200b",
    "a\u2028\u2029\u0085\u180e\ufeff|\x1c\x1d\x1e\x1f\x0b\x0c\x00",
    "🙂 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 …—“”‘’«» $€£ <a href='x'>&amp;</a> {{x}} {% y %}",
    *("x" + " " * n + "y" + "\n" + " " * n + "z" + " " * n for n in range(1, 34)),
    *("\t" * n + "a" + "\n" * n + " b" + " \n" * n for n in range(1, 5)),
)


class FastBPE:
    """A translated tokenizer; made by `translate` and `open_fast`."""

    def __init__(self, tokenizer_json: str, spec: Mapping[str, Any], dtype: type[np.unsignedinteger[Any]]) -> None:
        import tiktoken

        spelled = _Spelling(spec)
        # Added tokens are cut out of the text before merging. tiktoken calls all such tokens special.
        added = [token for token in spec["added_tokens"] if token["content"] not in spelled.space_runs]
        cut = {token["content"]: token["id"] for token in added}
        self.merged_tokens = spelled.merged_tokens
        self._tokenizer_json = tokenizer_json
        self._nfc = spelled.nfc
        self._all = frozenset(cut)
        self._ordinary = frozenset(token["content"] for token in added if not token["special"])
        ranks = spelled.ranks
        numbers = {text: len(ranks) + n for n, text in enumerate(cut)}
        self._core = tiktoken.Encoding(
            "llmtrain", pat_str=spelled.pattern, mergeable_ranks=ranks, special_tokens=numbers
        )
        self._ids = np.array([*spelled.ids, *cut.values()], dtype=dtype)

    def encode(self, text: str, *, special: bool = True) -> NDArray[np.unsignedinteger[Any]]:
        """The ids of a text, (n,): those of `tokenizers` without the tokens that a post-processor adds.

        Args:
            text: Any.
            special: Whether the text of a special token becomes that token. False takes it for ordinary text, as
                `tokenizers` does under `encode_special_tokens = True`.

        Raises:
            UnicodeEncodeError: the text holds half a surrogate pair.
        """
        if not text.isascii():
            text.encode()  # tiktoken would mend half a surrogate pair in its own way; `tokenizers` refuses it
            if self._nfc:
                text = unicodedata.normalize("NFC", text)
        cut = self._all if special else self._ordinary
        try:
            found = self._core.encode_to_numpy(text, allowed_special=cut, disallowed_special=())
        except ValueError:  # hundreds of thousands of line breaks: the regular expression gives up
            self.raw.encode_special_tokens = not special
            return np.array(self.raw.encode(text, add_special_tokens=False).ids, dtype=self._ids.dtype)
        return self._ids[found]

    @cached_property
    def raw(self) -> "Tokenizer":
        """The same tokenizer in `tokenizers`, without truncation and padding."""
        from tokenizers import Tokenizer

        raw = Tokenizer.from_str(self._tokenizer_json)
        raw.no_truncation()
        raw.no_padding()
        return raw


def open_fast(tokenizer: "Tokenizer") -> FastBPE | None:
    """The tokenizer on tiktoken's core, or None (said in one line of log) where the ids could differ.

    Checked are the parts of the pipeline, that each token's own spelling merges into that token, and the ids of a
    sample made of what the two libraries may see differently.

    Args:
        tokenizer: A byte-level BPE tokenizer, without truncation and padding; a copy is kept.
    """
    try:
        return translate(tokenizer.to_str())
    except Untranslatable as reason:
        log.info("tokenising with `tokenizers`, not with tiktoken's faster core: %s", reason)
        return None


def translate(
    tokenizer_json: str,
    dtype: type[np.unsignedinteger[Any]] = np.uint32,
    *,
    spec: Mapping[str, Any] | None = None,
    checked: bool = False,
) -> FastBPE:
    """The tokenizer on tiktoken's core; see `open_fast`.

    Args:
        tokenizer_json: Of a byte-level BPE tokenizer.
        dtype: Of the ids.
        spec: The same, parsed; None parses it.
        checked: This tokenizer has been through the check, with these versions of both libraries: leave it out.

    Raises:
        Untranslatable: the ids could differ.
    """
    spec = json.loads(tokenizer_json) if spec is None else spec
    try:
        fast = FastBPE(tokenizer_json, spec, dtype)
    except ImportError as problem:
        raise Untranslatable(str(problem)) from problem
    if not checked:
        ignore_merges, added = bool(spec["model"].get("ignore_merges")), [t["content"] for t in spec["added_tokens"]]
        del spec  # tens of megabytes, and the check opens the tokenizer a second time
        _check(fast, added, ignore_merges)
    return fast


class Untranslatable(Exception):
    """Why a tokenizer cannot be translated."""


class _Spelling:
    """A `tokenizer.json` in tiktoken's terms."""

    nfc: bool
    pattern: str
    space_runs: frozenset[str]
    """Added tokens that are nothing but spaces."""
    ranks: dict[bytes, int]
    """Bytes of a token -> when it is merged."""
    ids: list[int]
    """rank -> id."""
    merged_tokens: list[str]
    """Tokens that merging makes, in the alphabet of `vocab`."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        model = spec["model"]
        if model.get("type") != "BPE":
            raise Untranslatable(f"its model is {model.get('type')}, not BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                raise Untranslatable(f"its model has {key}")
        for token in spec["added_tokens"]:
            if token["lstrip"] or token["rstrip"] or token["single_word"]:
                raise Untranslatable(f"the added token {token['content']!r} takes part of its surroundings")
        self.nfc = _is_nfc(spec["normalizer"])
        for token in spec["added_tokens"]:
            if self.nfc and unicodedata.normalize("NFC", token["content"]) != token["content"]:
                raise Untranslatable(f"the added token {token['content']!r} is changed by normalisation")
        runs = {token["content"]: token["id"] for token in spec["added_tokens"] if _is_run_of_spaces(token)}
        self.space_runs = frozenset(runs)
        self.pattern = _pattern(spec["pre_tokenizer"], self.space_runs)
        self._fill_ranks(model, {token["content"] for token in spec["added_tokens"]}, runs)

    def _fill_ranks(self, model: Mapping[str, Any], added: set[str], runs: Mapping[str, int]) -> None:
        byte_of = _byte_of_character()
        vocab = model["vocab"]
        merged = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merged.append(left + right)
        # dict.fromkeys: where two merges make one token, the first counts.
        order = dict.fromkeys([*sorted(byte_of, key=lambda c: byte_of[c]), *merged])
        try:
            self.ids = [vocab[token] for token in order]
        except KeyError as missing:
            raise Untranslatable(f"{missing} is not in its vocabulary") from None
        latin = dict.fromkeys(range(256), "\uffff")  # what is not in the alphabet cannot be encoded below
        latin |= {ord(character): chr(byte) for character, byte in byte_of.items()}
        try:
            self.ranks = {token.translate(latin).encode("latin-1"): rank for rank, token in enumerate(order)}
        except UnicodeEncodeError as problem:
            raise Untranslatable(f"a merge holds what is not in the byte-level alphabet: {problem.object!r}") from None
        self.merged_tokens = list(order)
        unreachable = [token for token in vocab if token not in order and token not in added]
        if unreachable and model.get("ignore_merges"):
            raise Untranslatable(f"no merge makes {unreachable[0]!r}")
        # The pattern gives every run of spaces as a piece of its own and no other piece has two spaces side by side,
        # so the rank of a run of spaces can stand for the added token, and be made up where there is none.
        for run, number in runs.items():
            rank = self.ranks.setdefault(run.encode(), len(self.ids))
            if rank == len(self.ids):
                self.ids.append(number)
            else:
                self.ids[rank] = number


def _is_nfc(normalizer: Mapping[str, Any] | None) -> bool:
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        parts = [_is_nfc(part) for part in normalizer["normalizers"]]  # all of them: each may raise
        return any(parts)
    if normalizer["type"] != "NFC":
        raise Untranslatable(f"its normalizer is {normalizer['type']}")
    return True


def _pattern(pre_tokenizer: Mapping[str, Any] | None, space_runs: frozenset[str]) -> str:
    """The regular expression that cuts text before merging, with runs of spaces cut out first."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, **rest} if rest.get("use_regex", True):
            pattern = GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            pass
        case _:
            raise Untranslatable("its pre-tokenizer is not byte-level, or adds spaces")
    if not pattern.endswith(r"|\s+(?!\S)|\s+"):
        raise Untranslatable("its pre-tokenizer's pattern may leave text out")
    white = r"\s+"
    words = pattern.removesuffix(r"|\s+(?!\S)|\s+")
    if not space_runs:
        return _grouped(words, white)
    longest = max(map(len, space_runs))
    if pattern != GPT2_PATTERN or {len(run) for run in space_runs} != set(range(2, longest + 1)):
        raise Untranslatable("it has added tokens of spaces other than GPT-NeoX's")
    # `tokenizers` cuts the longest runs out first and then looks at what is between them. Here one expression does
    # both: a run comes first, and white space in general stops where one begins.
    return _grouped(rf" {{2,{longest}}}|{words}", r"(?:[^\S ]| (?! ))+")


def _grouped(words: str, white: str) -> str:
    """As one group, what needs no look ahead is matched in one go; a third faster."""
    return rf"(?:{words})|{white}(?!\S)|{white}"


def _is_run_of_spaces(token: Mapping[str, Any]) -> bool:
    return not token["special"] and len(token["content"]) > 1 and set(token["content"]) == {" "}


def _check(fast: FastBPE, added: Sequence[str], ignore_merges: bool) -> None:
    """Raises Untranslatable: an id differs.

    `tokenizers` merges a pair that is in its list, tiktoken any pair whose bytes make up a token. That is the same if
    each token's own spelling merges into the token: then the last pair before it is always the same, in any context.
    """
    raw = fast.raw
    if not ignore_merges:  # under it, a word that is a token is not merged at all
        for token in fast.merged_tokens:
            if len(raw.model.tokenize(token)) != 1:
                raise Untranslatable(f"merging the characters of {token!r} does not give that token")
    texts = [*_SAMPLE, *(f"a{token}b {token} \n" for token in added)]
    texts += [" ".join(texts), "".join(texts)]
    for special in (True, False):
        raw.encode_special_tokens = not special
        for text, expected in zip(texts, raw.encode_batch(texts, add_special_tokens=False), strict=True):
            if not np.array_equal(fast.encode(text, special=special), np.array(expected.ids, dtype=np.uint32)):
                raise Untranslatable(f"the ids of {text[:40]!r} differ")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte as a printable character; those that are not printable moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(moved)})
    return alphabet
