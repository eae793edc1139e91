"""Ids must be those of `tokenizers`, whatever the text."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmtrain.fast_bpe import open_fast

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train(pre_tokenizer, *, normalizer=None, special=SPECIAL, **model) -> Tokenizer:
    from pydoc_data.topics import topics

    raw = Tokenizer(models.BPE(**model))
    raw.pre_tokenizer = pre_tokenizer
    raw.decoder = decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text + " \n\n  Ünïcödé 漢字 🙂\t\t" for text in list(topics.values())[:12]]
    raw.train_from_iterator(texts, trainer)
    return raw


def gpt2_like() -> Tokenizer:
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False))


def neox_like() -> Tokenizer:
    raw = train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFC())
    raw.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(24, 1, -1)])
    raw.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return raw


def llama3_like() -> Tokenizer:
    return train(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )


@pytest.fixture(scope="module", params=[gpt2_like, neox_like, llama3_like])
def pair(request):
    raw = request.param()
    fast = open_fast(raw)
    assert fast is not None
    return raw, fast


def expected(raw: Tokenizer, text: str, special: bool) -> list[int]:
    raw.encode_special_tokens = not special
    return raw.encode(text, add_special_tokens=False).ids


WHITE = [" ", "  ", " " * 23, " " * 25, "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u200b", "\u2028", "\x85", "\x1c"]
WORDS = ["a", "Word", "'s", "'LL", "’t", "1", "1234", "²", "Ⅻ", "٣", "é", "e\u0301", "\u0301", "漢字", "한", "ไทย"]
SIGNS = ["🙂", "👩\u200d👧", "<", "|", "im_end", "<think>", "_", "...", "\x00", "\ufeff", "\U0010ffff"]
HOSTILE = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*WHITE, *WORDS, *SIGNS, *SPECIAL]), max_size=25).map("".join),
)


@settings(max_examples=400, deadline=None)
@given(text=HOSTILE, special=st.booleans())
def test_hostile_text_gives_the_ids_of_tokenizers(pair, text, special):
    raw, fast = pair
    assert fast.encode(text, special=special).tolist() == expected(raw, text, special)


def test_every_code_point_beside_letters_and_spaces(pair):
    raw, fast = pair
    points = [chr(n) for n in range(0x3100) if not 0xD800 <= n < 0xE000]
    points += [chr(n) for n in (*range(0xA000, 0xAB70, 7), *range(0xF900, 0x10000, 3), *range(0x10000, 0x20000, 61))]
    for start in range(0, len(points), 1000):
        text = "".join(f"a{c}b {c}  {c}\n{c}" for c in points[start : start + 1000])
        assert fast.encode(text).tolist() == expected(raw, text, True)


@pytest.mark.parametrize("text", ["x" * 20_000, " " * 20_000 + "y", "\n" * 9_000, "ab " * 5_000, "0" * 4_001])
def test_long_pieces(pair, text):
    raw, fast = pair
    assert fast.encode(text).tolist() == expected(raw, text, True)


def test_half_a_surrogate_pair_is_refused_not_mended(pair):
    with pytest.raises(UnicodeEncodeError):
        pair[1].encode("a \ud83d b")


def test_text_of_special_tokens_is_a_token_or_is_not(pair):
    raw, fast = pair
    text = "a<|im_end|>b"
    assert raw.token_to_id("<|im_end|>") in fast.encode(text)
    assert raw.token_to_id("<|im_end|>") not in fast.encode(text, special=False)
    assert raw.decode(fast.encode(text, special=False).tolist(), skip_special_tokens=False) == text


def metaspace() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(["the quick brown fox " * 9], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return raw


def prefix_space() -> Tokenizer:
    return train(pre_tokenizers.ByteLevel(add_prefix_space=True))


def greedy_token() -> Tokenizer:
    raw = gpt2_like()
    raw.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return raw


def lowercase() -> Tokenizer:
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase())


def unreachable_token() -> Tokenizer:
    """`abc` has a merge of `a` and `bc`, but `ab` comes first: `tokenizers` never makes `abc`, tiktoken would."""
    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*byte_level, "ab", "bc", "abc"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("a", "bc")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return raw


@pytest.mark.parametrize("make", [metaspace, prefix_space, greedy_token, lowercase, unreachable_token])
def test_what_cannot_be_translated_exactly_is_left_alone_and_said(make, caplog):
    with caplog.at_level(logging.INFO, logger="llmtrain.fast_bpe"):
        assert open_fast(make()) is None
    assert len(caplog.records) == 1
    assert "tokenizers" in caplog.text


def test_a_wrong_translation_is_noticed(monkeypatch):
    """The check at opening is what stands between a surprise in a tokenizer and wrong ids in training."""
    monkeypatch.setattr("llmtrain.fast_bpe.GPT2_PATTERN", r"[a-z]+| ?[^a-z]|\s+(?!\S)|\s+")
    assert open_fast(gpt2_like()) is None


def test_ids_are_an_array_of_uint32(pair):
    ids = pair[1].encode("some text")
    assert ids.dtype == np.uint32
    assert ids.ndim == 1
    assert pair[1].encode("").shape == (0,)


def test_the_tokenizer_given_is_left_as_it_was():
    raw = gpt2_like()
    before = json.loads(raw.to_str())
    fast = open_fast(raw)
    fast.encode("a" * 5000, special=False)
    assert raw.encode_special_tokens is False
    assert json.loads(raw.to_str()) == before
