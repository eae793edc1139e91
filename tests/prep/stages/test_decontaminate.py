import gzip
import json

import pytest

from llmtrain.errors import UserError
from llmtrain.prep.stages import describe_stages
from llmtrain.prep.stages.config import Decontaminate
from llmtrain.prep.stages.words import words
from tests.prep.stages.passing import judged

QUESTION = (
    "A train leaves the station at nine o'clock and travels west at sixty miles an hour; how far has it gone by noon, "
    "if it doesn't stop on the way?"
)
SHORT = "Who wrote the novel Pride and Prejudice, exactly?"  # 8 words


def stage(*files, **keys):
    return Decontaminate(name="decontaminate", files=[str(file) for file in files], **keys)


@pytest.fixture
def exam(tmp_path):
    rows = [{"id": "q1", "question": SHORT, "choices": ["Austen", "Eliot"]}, {"id": "q2", "question": QUESTION}]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_words_are_those_of_gpt3():
    assert words("Don't, STOP: it's o'clock!\tA_b", joined=True) == ["dont", "stop", "its", "oclock", "ab"]
    assert words("Ça n’est «rien»", joined=True) == ["ça", "nest", "rien"]
    assert words("Don't") == ["don", "t"]


def test_a_document_that_holds_an_item_is_dropped_and_the_item_named(exam):
    clean = "Nothing of an exam is in here, though a train leaves the station at nine o'clock and travels."
    dirty = f"Homework:\n\n{QUESTION.upper().replace(' ', '  ').replace(';', ' --')}\n\nAnswer: 180."
    left, report = judged(stage(exam), clean, dirty)
    assert left == [clean, None]
    assert report["counts"] == {"exam.jsonl": 1}
    n = len(words(QUESTION, joined=True)) - 12
    assert report["samples"] == [
        {
            "place": "docs.jsonl:2",
            "reason": f"exam.jsonl: {n} n-grams, first of {exam}:2",
            "excerpt": "a train leaves the station at nine oclock and travels west at sixty",
        }
    ]


def test_thirteen_words_are_enough_and_twelve_are_not(exam):
    of_question = QUESTION.split()
    assert judged(stage(exam), " ".join(of_question[3:16]))[0] == [None]
    assert judged(stage(exam), " ".join(of_question[3:15]))[0] == [" ".join(of_question[3:15])]
    assert judged(stage(exam, n_grams=12), " ".join(of_question[3:15]))[0] == [None]
    assert judged(stage(exam, min_matches=2), " ".join(of_question[3:16]))[0] == [" ".join(of_question[3:16])]
    assert judged(stage(exam, min_matches=2), " ".join(of_question[3:17]))[0] == [None]


def test_a_short_text_of_an_item_is_looked_for_as_a_whole(exam):
    text = f"He asked: {SHORT} She knew."
    assert judged(stage(exam), text, text.replace("novel", "book"))[0] == [None, text.replace("novel", "book")]
    assert judged(stage(exam, min_item_words=9), text)[0] == [text]


def test_columns(exam, tmp_path):
    text = f"{QUESTION} {SHORT}"
    assert judged(stage(exam, columns=["question"]), text)[0] == [None]
    with pytest.raises(UserError, match=r"stage decontaminate: .*exam.jsonl:2 has no choices; it has id, question"):
        judged(stage(exam, columns=["choices"]), text)
    joined = tmp_path / "joined.jsonl"
    joined.write_text(json.dumps({"a": "one two three four five six", "b": ["seven eight nine ten"], "c": 3}))
    text = "one two three four five six seven eight nine ten"
    assert judged(stage(joined, columns=["a", "b"]), text)[0] == [None]
    with pytest.raises(UserError, match=r"no text in .*joined.jsonl has 8 words \(min_item_words\)"):
        judged(stage(joined), text)


def test_kinds_of_files(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps({"q": QUESTION}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"q": "no"}, {"q": {"deep": [QUESTION]}}], indent=1))
    (tmp_path / "c.txt").write_text(f"An introduction.\n{QUESTION}\n")
    (tmp_path / "d.json").write_text(json.dumps({"q": QUESTION}) + "\n" + json.dumps(QUESTION))
    for name, item in (("a.jsonl.gz", 2), ("b.json", 2), ("c.txt", 1), ("d.json", 1)):
        left, report = judged(stage(tmp_path / name), QUESTION)
        assert left == [None]
        assert report["samples"][0]["reason"].endswith(f"{name}:{item}")
    left, report = judged(stage(tmp_path / "*"), QUESTION)
    assert report["counts"] == {"a.jsonl.gz": 1}


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"files: .*none\.\*: no such file"):
        judged(stage(tmp_path / "none.*"), "x")
    (tmp_path / "bad.jsonl").write_text('{"q": "x"}\n{"q": \n')
    with pytest.raises(UserError, match=r"bad.jsonl:2 is not JSON"):
        judged(stage(tmp_path / "bad.jsonl"), "x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin.txt cannot be read"):
        judged(stage(tmp_path / "latin.txt"), "x")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps({"q": QUESTION * 50}).encode())[:-12])
    with pytest.raises(UserError, match=r"cut.jsonl.gz cannot be read"):
        judged(stage(tmp_path / "cut.jsonl.gz"), "x")


def test_a_changed_evaluation_file_is_seen(exam):
    before = describe_stages([stage(exam)])
    assert before == [{"stage": "0-decontaminate", "files": {str(exam): before[0]["files"][str(exam)]}}]
    exam.write_text(exam.read_text().replace("nine", "ten"))
    assert describe_stages([stage(exam)]) != before


def test_a_process_that_goes_on_reads_a_changed_file_again(exam):
    assert judged(stage(exam), QUESTION)[0] == [None]
    exam.write_text(json.dumps({"question": "another " * 20}))
    assert judged(stage(exam), QUESTION)[0] == [QUESTION]
