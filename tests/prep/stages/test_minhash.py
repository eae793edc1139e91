import random
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.prep.stages import copies, minhash
from llmtrain.prep.stages.config import MinHashDedup
from llmtrain.prep.stages.words import words
from tests.prep.stages.passing import carry_out, judged, numbered

pytest.importorskip("rensa", reason="the extra [quality] is not installed")

STAGE = MinHashDedup(name="minhash_dedup")
TEXTS = [text for _, text in sorted(topics.items()) if len(text.split()) >= 150]  # chapters of Python's reference


def n_grams(text, n=5):
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def similarity(a, b):
    return jaccard(n_grams(a), n_grams(b))


def edited(text, changes, seed=0):
    """The text with some words replaced."""
    rng = random.Random(seed)
    found = text.split(" ")
    for place in rng.sample(range(len(found)), changes):
        found[place] = f"w{rng.randrange(10**6)}"
    return " ".join(found)


def test_near_copies_of_real_texts_are_dropped_and_different_texts_never():
    grams = [n_grams(text) for text in TEXTS]
    different = [text for n, text in enumerate(TEXTS) if all(jaccard(grams[n], other) < 0.3 for other in grams[:n])]
    edits = [edited(text, max(1, len(text.split(" ")) // 400), seed) for seed, text in enumerate(different)]
    near = [copy for text, copy in zip(different, edits, strict=True) if similarity(text, copy) >= 0.9]
    assert min(len(different), len(near)) > 40
    kept, report = carry_out([STAGE], [numbered(different), numbered(near)])
    assert [doc.text for doc in kept[0]] == different
    assert len(kept[1]) <= 1  # each is found with a probability of 0.999 or more
    assert report["stages"][0]["dropped"] == len(near) - len(kept[1])


@pytest.mark.parametrize("wanted", [0.6, 0.7, 0.8])
def test_pairs_are_found_as_often_as_the_curve_says(wanted):
    """Sets of n-grams with a known overlap, through the hashes of the buckets."""
    rng = np.random.default_rng(1)
    pairs, size = 600, 300
    shared = round(2 * size * wanted / (1 + wanted))
    grams = []
    for _ in range(pairs):
        both = rng.integers(0, 2**64, shared, dtype=np.uint64)
        for _ in range(2):
            alone = rng.integers(0, 2**64, size - shared, dtype=np.uint64)
            grams.append(np.concatenate([both, alone]))
    exact = shared / (2 * size - shared)
    buckets = minhash._buckets(STAGE, grams).reshape(pairs, 2, -1)
    found = (buckets[:, 0] == buckets[:, 1]).any(axis=1).mean()
    expected = STAGE.probability(exact)
    assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / pairs) + 0.01


def test_threshold_is_where_half_of_the_pairs_are_found():
    assert STAGE.probability(STAGE.threshold()) == pytest.approx(0.5)
    assert STAGE.threshold() == pytest.approx(0.685, abs=1e-3)


def test_case_punctuation_and_white_space_make_no_difference():
    text = TEXTS[0]
    loud = text.upper().replace(".", " !").replace("\n", "   ")
    assert judged(STAGE, text, loud)[0] == [text, None]


def test_short_documents_are_copies_only_if_their_words_are_equal_and_those_without_words_never():
    texts = ["hello world", "Hello, world!", "hello", "world", "!!!", "???", "", ""]
    assert judged(STAGE, *texts)[0] == ["hello world", None, "hello", "world", "!!!", "???", "", ""]


def test_copies_of_copies_are_one_cluster_whose_first_stays():
    """a ~ b ~ c, where a and c alone would hardly be found."""
    words_of = TEXTS[1].split()[:400]
    chain = [" ".join(words_of[start : start + 200]) for start in range(0, 200, 8)]
    assert similarity(chain[0], chain[-1]) < 0.1
    kept, report = carry_out([STAGE], [numbered(chain)])
    assert [doc.text for doc in kept[0]] == chain[:1]
    assert report["stages"][0]["counts"] == {"a near copy of an earlier document": len(chain) - 1}


def test_within_a_source_copies_in_another_source_stay():
    text = TEXTS[2]
    stage = MinHashDedup(name="minhash_dedup", within="source")
    a, b = numbered([text, edited(text, 1)]), numbered([text])
    assert [len(part) for part in carry_out([stage], [a, b], [0, 1])[0]] == [1, 1]
    assert [len(part) for part in carry_out([STAGE], [a, b], [0, 1])[0]] == [1, 0]


def test_scripts_without_spaces_are_compared_by_characters():
    text = "".join(chr(0x4E00 + n * 7 % 900) for n in range(400))
    assert judged(STAGE, text, text[:200] + "x" + text[200:], text[::-1])[0] == [text, None, text[::-1]]
    assert words("ไทย abc 日本-go") == ["ไ", "ท", "ย", "abc", "日", "本", "go"]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_what_is_dropped_does_not_depend_on_partitions(picks, data):
    texts = [edited(TEXTS[pick], 2, seed) for seed, pick in enumerate(picks)]
    documents = numbered(texts)
    cut = data.draw(st.integers(0, len(texts)))
    kept, report = carry_out([STAGE], [documents[:cut], documents[cut:]])
    alone, alone_report = carry_out([STAGE], [documents])
    assert [doc for part in kept for doc in part] == alone[0]
    assert report == alone_report


def test_signatures_do_not_depend_on_what_is_signed_together():
    documents = numbered(TEXTS[:20])
    together = minhash.sign(STAGE, documents)
    for n in (0, 7, 19):
        alone = minhash.sign(STAGE, documents[n : n + 1])
        assert all(alone[name][0] == together[name][n] for name in together)


def test_memory_for_few_hashes_finds_the_same(monkeypatch):
    documents = [numbered([edited(text, 1, seed) for text in TEXTS[:12]]) for seed in range(3)]
    plenty = carry_out([STAGE], documents)
    assert plenty[1]["stages"][0]["dropped"] >= 20
    for at_once in (10, 36 * 4):  # ranges of values; some buckets at a time
        monkeypatch.setattr(copies, "AT_ONCE", at_once)
        assert carry_out([STAGE], documents) == plenty


@pytest.mark.parametrize("library", ["rensa", "scipy.sparse"])
def test_without_its_libraries_the_message_says_what_to_install(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=r"minhash_dedup needs \w+: pip install 'llmtrain\[quality\]'"):
        judged(STAGE, TEXTS[0], TEXTS[0])
