"""Bytes of tokens: the text of byte-level ids is known from the ids alone, any other from where its tokens end."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtrain.evaluation.token_bytes import UnknownBytes, bytes_of_ids, bytes_of_tokens
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

TEXT = "def naïve():\n    return '日本語 🙂'  # the quick brown fox\n"


def test_ids_of_a_byte_level_tokenizer_decode_to_as_many_bytes(tokenizer: Path) -> None:
    opened = load_tokenizer(TokenizerConfig(name=str(tokenizer)))
    opened.add_tokens(["    "])  # as GPT-NeoX has them: blanks, and no special token
    table = bytes_of_ids(opened, len(opened) + 7)
    ids = opened(TEXT, add_special_tokens=False)["input_ids"]
    assert opened.convert_tokens_to_ids("    ") in ids
    assert table[ids].sum() == len(TEXT.encode())
    assert table[opened.eos_token_id] == 0
    assert table[-7:].tolist() == [0] * 7


@pytest.mark.parametrize("kind", ["prefix", "word pieces"])
def test_where_ids_do_not_tell_it_is_said(kind: str) -> None:
    raw = Tokenizer(models.BPE({"a": 0, "b": 1}, []) if kind == "prefix" else models.WordPiece({"a": 0}, unk_token="a"))
    raw.decoder = decoders.ByteLevel() if kind == "prefix" else decoders.WordPiece()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    with pytest.raises(UnknownBytes, match="blank before" if kind == "prefix" else "not byte-level"):
        bytes_of_ids(PreTrainedTokenizerFast(tokenizer_object=raw, add_prefix_space=kind == "prefix"), 10)


def ends(raw: Tokenizer, text: str) -> np.ndarray:
    return np.array([end for _, end in raw.encode(text, add_special_tokens=False).offsets], np.int64)


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    """Whatever stands in it, and whatever the tokenizer passes over or puts together from pieces of a character."""
    raw = RAW
    found = ends(raw, text)
    if len(found):
        sizes = bytes_of_tokens(text, found)
        assert sizes.sum() == len(text.encode("utf-8", "surrogatepass"))
        assert (sizes >= 0).all()


def test_what_is_passed_over_belongs_to_the_token_behind_it() -> None:
    assert bytes_of_tokens("  ab cé ", np.array([3, 4, 6, 7])).tolist() == [3, 1, 2, 3]


def _raw() -> Tokenizer:
    """Not byte-level: it drops blanks and accents, and knows few characters."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


RAW = _raw()
