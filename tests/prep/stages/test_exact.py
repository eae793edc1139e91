import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.prep.stages import needs_whole_documents
from llmtrain.prep.stages.config import ExactDedup, Length
from tests.prep.stages.passing import carry_out, document, judged, numbered

STAGE = ExactDedup(name="exact_dedup")
LOOSE = ExactDedup(name="exact_dedup", ignore=["case", "whitespace"])


def firsts(texts, same):
    seen = set()
    return [n for n, text in enumerate(texts) if not (same(text) in seen or seen.add(same(text)))]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="aAbB \n", max_size=4), max_size=40), st.data())
@pytest.mark.parametrize(
    ("stage", "same"), [(STAGE, lambda text: text), (LOOSE, lambda text: " ".join(text.split()).lower())]
)
def test_the_first_of_each_class_stays_however_documents_are_partitioned(stage, same, texts, data):
    documents = numbered(texts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=5)))
    partitions = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
    kept, report = carry_out([stage], partitions)
    assert [doc for part in kept for doc in part] == [documents[n] for n in firsts(texts, same)]
    assert report == carry_out([stage], [documents])[1]
    assert report["stages"][0]["dropped"] == len(texts) - len(firsts(texts, same))


def test_within_a_source_copies_in_another_source_stay():
    a, b = numbered(["x", "y", "x"]), numbered(["x", "z", "z"])
    inside = ExactDedup(name="exact_dedup", within="source")
    assert [[doc.text for doc in part] for part in carry_out([inside], [a, b], [0, 1])[0]] == [["x", "y"], ["x", "z"]]
    assert [[doc.text for doc in part] for part in carry_out([inside], [a, b], [1, 1])[0]] == [["x", "y"], ["z"]]
    assert [[doc.text for doc in part] for part in carry_out([STAGE], [a, b], [0, 1])[0]] == [["x", "y"], ["z"]]


def test_parts_of_a_long_document_are_kept_or_dropped_together():
    long = [document("one ", 0, "first"), document("two ", 0, "middle"), document("three", 0, "last")]
    copy = [document("one t", 2, "first"), document("wo three", 2, "last")]
    other = [document("one ", 3, "first"), document("two", 3, "last")]
    kept, report = carry_out([STAGE], [[*long, document("alone", 1), *copy, *other], [document("one two three", 0)]])
    assert kept == [[*long, document("alone", 1), *other], []]
    stage = report["stages"][0]
    assert (stage["seen"], stage["dropped"]) == (5, 2)
    assert (stage["seen_bytes"], stage["dropped_bytes"]) == (13 + 5 + 13 + 7 + 13, 26)
    assert not needs_whole_documents([STAGE])


def test_white_space_makes_no_difference_where_a_long_document_is_cut_either():
    one = [document("one t", 0, "first"), document("wo ", 0, "middle"), document("three", 0, "last")]
    same = [document("one  ", 1, "first"), document("two\n three", 1, "last")]
    other = [document("one t", 2, "first"), document("wothree", 2, "last")]
    kept, _ = carry_out([LOOSE], [[*one, *same, *other]])
    assert [doc.text for doc in kept[0]] == ["one two three", "one twothree"]


def test_what_looks_into_a_text_needs_it_whole():
    assert needs_whole_documents([LOOSE])
    assert needs_whole_documents([STAGE, Length(name="length", min_chars=1)])
    assert not needs_whole_documents([])


def test_a_stage_before_it_decides_what_is_compared_and_counted():
    """What an earlier stage drops is no first, and the numbering goes on from what reaches the pass."""
    stages = [Length(name="length", min_chars=2), STAGE]
    documents = numbered(["a", "bb", "a", "bb", "cc", "a", "bb", "dd"])
    kept, report = carry_out(stages, [documents[:3], documents[3:]])
    assert [doc.key for part in kept for doc in part] == ["docs\x001", "docs\x004", "docs\x007"]
    assert [(stage["seen"], stage["dropped"]) for stage in report["stages"]] == [(8, 3), (5, 2)]


def test_two_passes_the_second_sees_what_the_first_leaves():
    stages = [STAGE, Length(name="length", max_chars=3), LOOSE]
    kept, report = carry_out(stages, [numbered(["ab", "AB", "ab", "toolong"]), numbered(["a b", "A  B", "AB", "c"])])
    assert [[doc.text for doc in part] for part in kept] == [["ab"], ["a b", "c"]]
    assert [stage["dropped"] for stage in report["stages"]] == [2, 2, 1]


def test_lone_surrogates_and_empty_texts_are_texts_like_others():
    texts = ["", "\ud800", "\ud801", "", "\ud800"]
    documents = [document("", n)._replace(text=text) for n, text in enumerate(texts)]
    assert [doc.text for doc in carry_out([STAGE], [documents])[0][0]] == ["", "\ud800", "\ud801"]


def test_samples_name_the_place_and_the_text():
    _, report = judged(ExactDedup(name="exact_dedup", samples=1), "the same", "the same", "the same")
    assert report["samples"] == [
        {"place": "docs.jsonl:2", "reason": "a copy of an earlier document", "excerpt": "the same"}
    ]
    assert report["counts"] == {"a copy of an earlier document": 2}


def test_many_documents_of_few_classes():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(string.ascii_letters), 2)) for _ in range(5000)]
    kept, _ = carry_out([STAGE], [numbered(texts[:1234]), numbered(texts[1234:], 1234)])
    assert [doc.text for part in kept for doc in part] == list(dict.fromkeys(texts))
