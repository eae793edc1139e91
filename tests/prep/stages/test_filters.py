from pydoc_data.topics import topics

import pytest

from llmtrain.prep.stages.config import Length, Repetition, SymbolRatio
from tests.prep.stages.passing import judged

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful property "
    "of some one or other of their daughters."
)


def reasons(stage, text):
    (left,), report = judged(stage, text)
    assert (left is None) == bool(report["counts"])
    return list(report["counts"])


@pytest.mark.parametrize(
    ("bounds", "text", "expected"),
    [
        ({"min_chars": 5}, "four", ["below min_chars"]),
        ({"min_chars": 4, "max_chars": 4}, "four", []),
        ({"max_chars": 3}, "four", ["above max_chars"]),
        ({"min_words": 3}, "two\n words ", ["below min_words"]),
        ({"min_words": 2, "max_words": 2}, "two\n words ", []),
        ({"max_words": 1}, "two words", ["above max_words"]),
        ({"min_mean_word_length": 3}, "a bcd", ["below min_mean_word_length"]),
        ({"max_mean_word_length": 2}, "a bcd", []),
        ({"max_mean_word_length": 1.9}, "a bcd", ["above max_mean_word_length"]),
        ({"min_words": 1}, "", ["below min_words"]),
        ({"min_mean_word_length": 1}, "", ["below min_mean_word_length"]),
        ({"max_chars": 0}, "", []),
    ],
)
def test_length(bounds, text, expected):
    assert reasons(Length(name="length", **bounds), text) == expected


def test_samples_say_what_was_measured():
    _, report = judged(Length(name="length", min_words=3, max_mean_word_length=4), "one two", "a bb sesquipedalian")
    assert [sample["reason"] for sample in report["samples"]] == [
        "below min_words: 2 words",
        "above max_mean_word_length: 5.667 mean_word_length",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, []),
        ("", []),
        (" \n ", []),
        ("# a b c d e f g h i j", []),  # 1 in 11
        ("# a b c d # e f g h", ["hashes per word"]),  # 2 in 10
        ("so ... it goes… on and on", ["ellipses per word"]),
        ("- one two three\n• four five six\n\n* seven eight nine", ["bullet lines"]),
        ("-one two three\n" * 9 + "last", []),  # 0.9
        (PROSE + "\n" + "\n".join(PROSE[:60] + "..." for _ in range(2)), ["ellipsis lines"]),
        ("one 2 3 4 5", ["alphabetic words"]),
        ("a b c d 5", []),
        ("é ж 語 ä 5", []),
    ],
)
def test_symbols(text, expected):
    assert reasons(SymbolRatio(name="symbol_ratio"), text) == expected


def test_symbols_rules_can_be_changed_and_turned_off():
    table = "1 2 3 4 # # # #"
    off = {"max_symbols_per_word": None, "min_alphabetic_words": None}
    assert reasons(SymbolRatio(name="symbol_ratio", **off), table) == []
    assert reasons(SymbolRatio(name="symbol_ratio", **off, max_digit_chars=0.4), table) == ["digits"]
    assert reasons(SymbolRatio(name="symbol_ratio", **off, max_digit_chars=0.5), table) == []
    stop_words = SymbolRatio(name="symbol_ratio", min_stop_words=2)
    assert reasons(stop_words, PROSE) == []
    assert reasons(stop_words, "Das ist ein deutscher Satz, that is it.") == ["stop words"]
    assert reasons(stop_words, "The end of it.") == []


def test_real_documentation_is_neither_symbols_nor_repetition():
    texts = [topics[name] for name in ("assert", "exceptions", "import", "naming")]
    assert judged(SymbolRatio(name="symbol_ratio"), *texts)[0] == texts
    assert judged(Repetition(name="repetition"), PROSE, texts[0])[0] == [PROSE, texts[0]]


ONLY = {
    "max_duplicate_lines": None,
    "max_duplicate_paragraphs": None,
    "max_duplicate_line_chars": None,
    "max_duplicate_paragraph_chars": None,
    "max_top_n_gram_chars": {},
    "max_duplicate_n_gram_chars": {},
}


@pytest.mark.parametrize(
    ("rule", "text", "share"),
    [
        ("max_duplicate_lines", "a\nb\n\na \n a\nccccc", 2 / 5),
        ("max_duplicate_line_chars", "aa\nb\n\naa \nccccc", 2 / 10),
        ("max_duplicate_paragraphs", "x\ny\n\nz\n \nx\ny\n", 1 / 3),
        ("max_duplicate_paragraph_chars", "xxx\n\nz\n\nxxx", 3 / 7),
        ({"max_top_n_gram_chars": 2}, "the cat and the cat or the dog", 2 * 6 / 23),
        ({"max_top_n_gram_chars": 2}, "no pair occurs in here twice", 0),
        ({"max_top_n_gram_chars": 2}, "one", 0),
        ({"max_duplicate_n_gram_chars": 3}, "a bb c dd a bb c", 4 / 10),
        ({"max_duplicate_n_gram_chars": 3}, "x x x x x x", 5 / 6),  # overlaps count once
        ({"max_duplicate_n_gram_chars": 3}, "a bb", 0),
    ],
)
def test_each_rule_of_repetition_by_its_share(rule, text, share):
    def stage(limit):
        given = {rule: limit} if isinstance(rule, str) else {key: {n: limit} for key, n in rule.items()}
        return Repetition(name="repetition", **{**ONLY, **given})

    assert reasons(stage(share), text) == []
    if share:
        assert len(reasons(stage(share - 1e-9), text)) == 1


def test_repetitive_text_is_dropped():
    stage = Repetition(name="repetition")
    assert reasons(stage, "Buy now!\n" * 20) == ["duplicate lines"]
    assert reasons(stage, f"{PROSE} {PROSE}") == ["characters in duplicate 5-grams"]
    assert reasons(stage, " ".join(["spam"] * 30)) == ["characters in the top 2-gram"]
    assert reasons(stage, "") == []
