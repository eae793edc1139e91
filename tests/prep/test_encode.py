"""Which core tokenises, and that both give the ids of `tokenizers`."""

import gc
import json
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llmtrain.errors import UserError
from llmtrain.prep import encode
from llmtrain.prep.config import TokenizerTraining
from llmtrain.prep.documents import Document
from llmtrain.prep.encode import choose_core, open_encoder
from llmtrain.prep.train_tokenizer import train_tokenizer

TEXTS = [*list(topics.values())[20:40], "", "déjà vu 漢字 <|endoftext|> end", "x" * 30_000, "\n" * 700_000 + "x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(topics.values(), TokenizerTraining(vocab_size=600), folder)
    return str(folder)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metaspace")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(topics.values(), trainers.BpeTrainer(vocab_size=300, show_progress=False))
    raw.enable_truncation(10)  # files of the hub may say so; a corpus is not truncated
    raw.save(str(folder / "tokenizer.json"))
    return str(folder)


def documents():
    return [Document(text, len(text.encode()), str(n), "p") for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("core", ["tiktoken", "tokenizers"])
def test_ids_are_those_of_tokenizers(byte_level, core):
    found = open_encoder(byte_level, eos=True, bos=False, core=core).encode(documents())
    raw = Tokenizer.from_file(f"{byte_level}/tokenizer.json")
    assert [ids.tolist() for ids in found] == [raw.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}


def test_byte_level_takes_the_fast_core_and_no_reason(byte_level):
    assert choose_core(byte_level, TEXTS) == ("tiktoken", "")


def test_another_kind_of_tokenizer_is_left_to_tokenizers_and_not_truncated(metaspace):
    core, reason = choose_core(metaspace, TEXTS)
    assert core == "tokenizers"
    assert "byte-level" in reason
    ids = open_encoder(metaspace, eos=False, bos=False, core=core).encode(documents()[:1])[0]
    assert len(ids) > 100


def test_a_difference_on_the_users_own_text_is_found(byte_level, monkeypatch):
    """The last defence: whatever the checks of the tokenizer miss shows up on the corpus itself."""
    monkeypatch.setattr("llmtrain.fast_bpe._check", lambda *_: None)
    monkeypatch.setattr("llmtrain.fast_bpe.GPT2_PATTERN", r"[a-z]+| ?[^a-z]|\s+(?!\S)|\s+")
    core, reason = choose_core(byte_level, iter([topics["assert"]]))
    assert core == "tokenizers"
    assert repr(topics["assert"][:40]) in reason


def test_the_sample_is_bounded(byte_level, monkeypatch):
    monkeypatch.setattr(encode, "_SAMPLE", 1000)
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "some words " * 30

    assert choose_core(byte_level, endless())[0] == "tiktoken"
    assert len(taken) == 4


def test_the_parsed_file_is_gone_when_the_tokenizer_is_opened_a_second_time(byte_level, monkeypatch):
    """Tens of megabytes for 50,000 tokens, on top of the highest point of planning."""
    parsed = []

    def look(*_):
        objects = gc.get_objects()
        parsed.append([one for one in objects if type(one) is dict and {"pre_tokenizer", "added_tokens"} <= one.keys()])

    monkeypatch.setattr("llmtrain.fast_bpe._check", look)
    assert choose_core(byte_level, ["text"])[0] == "tiktoken"
    assert parsed == [[]]


def test_a_missing_bos_is_named(metaspace):
    with pytest.raises(UserError, match="has no bos_token: choose another one, or set bos: false"):
        open_encoder(metaspace, eos=False, bos=True, core="tokenizers")


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json: KeyError\('vocab'\)"):
        open_encoder(str(tmp_path), eos=False, bos=False, core="tiktoken")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        choose_core(str(tmp_path), [])
