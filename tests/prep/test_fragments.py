"""A long document in parts has the ids of the whole, wherever its reader cut it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmtrain.prep import fragments as module
from llmtrain.prep.documents import Document
from llmtrain.prep.encode import Encoder, choose_core, open_encoder
from llmtrain.prep.fragments import fragments

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"


def gpt2_like(raw: Tokenizer) -> None:
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def neox_like(raw: Tokenizer) -> None:
    gpt2_like(raw)
    raw.normalizer = normalizers.NFC()


def llama3_like(raw: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def metaspace(raw: Tokenizer) -> None:
    raw.pre_tokenizer = pre_tokenizers.Metaspace()


def prepended(raw: Tokenizer) -> None:
    """Every text begins with a mark, as in Llama 2: no cut at all leaves the ids alone."""
    raw.normalizer = normalizers.Prepend("^")
    gpt2_like(raw)


KINDS = {kind.__name__: kind for kind in (gpt2_like, neox_like, llama3_like, metaspace, prepended)}
EXACT = ["gpt2_like", "neox_like", "llama3_like", "metaspace"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    def make(kind: str) -> str:
        from pydoc_data.topics import topics

        folder = tmp_path_factory.mktemp(kind)
        raw = Tokenizer(models.BPE())
        KINDS[kind](raw)
        raw.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        )
        raw.train_from_iterator([text + " \n\n  Ünï 漢字。\t" for text in list(topics.values())[:12]], trainer)
        if kind == "neox_like":
            raw.add_tokens([AddedToken(" " * n, normalized=True, special=False) for n in range(24, 1, -1)])
            raw.add_tokens([AddedToken("one two", normalized=False, special=False)])  # spans a place to cut
        raw.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(f'{{"eos_token": "{EOS}"}}')
        return str(folder)

    made: dict[str, str] = {}
    return lambda kind: made.setdefault(kind, "") or made.__setitem__(kind, make(kind)) or made[kind]


@pytest.fixture
def short(monkeypatch):
    """Parts and windows small enough for generated texts."""
    for name, value in {"LONG": 60, "_HARD": 2_000, "_CONTEXT": 25, "_REACH": 50}.items():
        monkeypatch.setattr(module, name, value)


def parts_of(pieces: list[str]) -> list[Document]:
    labels = ["first", *["middle"] * (len(pieces) - 2), "last"]
    return [Document(text, len(text.encode()), "k", "p", label) for text, label in zip(pieces, labels, strict=True)]


def whole(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode([Document(text, len(text.encode()), "k", "p")])[0].tolist()


WORDS = ["word", " next", " one two", "one two", "'s", " 12", "3 4", "\n", "\n\n", "  ", " " * 9, ".", ". A", "x = y\n"]
HOSTILE = ["e\u0301 a", "\u0301", "漢字。仮名", "한", "\t", "\r\n", EOS, "<|end", "-" * 9, "🙂", "\u00a0b", "_a _b"]
TEXT = st.lists(st.sampled_from([*WORDS, *WORDS, *HOSTILE]), min_size=2, max_size=120).map("".join)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=60, deadline=None)
@given(text=TEXT.filter(lambda text: len(text) > 2), data=st.data())
def test_parts_have_the_ids_of_the_whole_wherever_they_are_cut(folder_of, kind, text, data):
    places = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), min_size=1, max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    core, _ = choose_core(folder_of(kind), [text])
    encoder = open_encoder(folder_of(kind), eos=True, bos=False, core=core)
    before = {name: getattr(module, name) for name in ("_HARD", "_CONTEXT", "_REACH")}
    try:
        module._HARD, module._CONTEXT, module._REACH = 10_000, 25, 60
        found = np.concatenate(encoder.encode(parts_of(pieces))).tolist()
    finally:
        for name, value in before.items():
            setattr(module, name, value)
    assert found == whole(encoder, text)
    assert encoder.hard_cuts == 0


@settings(max_examples=200, deadline=None)
@given(text=TEXT, step=st.integers(1, 300))
def test_fragments_are_the_text_and_do_not_depend_on_the_chunks(text, step):
    before = module.LONG, module._HARD
    try:
        module.LONG, module._HARD = 40, 320
        parts = list(fragments(text[start : start + step] for start in range(0, len(text), step)))
        assert parts == list(fragments([text]))
    finally:
        module.LONG, module._HARD = before
    assert "".join(parts) == text
    assert all(40 <= len(part) <= 320 for part in parts[:-1])


def test_an_ordinary_long_text_is_cut_between_words_and_each_part_is_encoded_as_it_comes(folder_of, short):
    text = "Some words of a text that goes on and on\n" * 50
    encoder = open_encoder(folder_of("gpt2_like"), eos=True, bos=False, core="tiktoken")
    pieces = list(fragments([text]))
    ids = encoder.encode(parts_of(pieces))
    assert len(pieces) > 10
    assert all(len(part) <= 120 for part in pieces)
    assert all(len(some) > 0 for some in ids)
    assert np.concatenate(ids).tolist() == whole(encoder, text)


@pytest.mark.parametrize(("kind", "text"), [("prepended", "word next " * 800), ("gpt2_like", "-+" * 4_000)])
def test_text_without_a_place_is_cut_hard_and_counted(folder_of, short, kind, text):
    core, _ = choose_core(folder_of(kind), [text[:100]])
    encoder = open_encoder(folder_of(kind), eos=True, bos=False, core=core)
    pieces = list(fragments([text]))
    ids = encoder.encode(parts_of(pieces))
    assert encoder.hard_cuts >= 2
    assert sum(map(len, ids)) == pytest.approx(len(whole(encoder, text)), rel=0.05)


def test_what_a_document_left_does_not_run_into_the_next(folder_of, short):
    """A document that breaks off (its reader failed) leaves nothing behind."""
    encoder = open_encoder(folder_of("gpt2_like"), eos=True, bos=False, core="tiktoken")
    text = "other words " * 20
    encoder.encode(parts_of(["one two three " * 20, "four"])[:1])
    assert np.concatenate(encoder.encode(parts_of([text[:99], text[99:]]))).tolist() == whole(encoder, text)


def test_cuts_within_words_reach_the_report(corpus, monkeypatch):
    monkeypatch.setattr("llmtrain.prep.readers.LONG", 4096)
    monkeypatch.setattr("llmtrain.prep.fragments.LONG", 4096)
    monkeypatch.setattr("llmtrain.prep.fragments._HARD", 8 * 4096)
    assert corpus.make(out=str(corpus.folder / "other"))[0]["hard_cuts"] == 0
    with corpus.files[0].open("a") as file:
        file.write(json.dumps({"text": "-" * 100_000}) + "\n")
    content, said = corpus.make(partition_bytes=1_000_000)
    assert content["hard_cuts"] == 3
    assert json.loads((corpus.out / "prep.json").read_text())["hard_cuts"] == 3
    assert "3 cuts in long documents, without a place to cut" in said
