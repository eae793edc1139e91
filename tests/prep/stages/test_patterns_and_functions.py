import sys

import numpy as np
import pytest

from llmtrain.errors import UserError
from llmtrain.prep.stages import describe_stages
from llmtrain.prep.stages.config import Language, Regex, UserFunction
from tests.prep.stages.passing import judged

MODULE = """
import re

def short(text):
    return len(text) < 10

def tidy(text):
    return re.sub(" +", " ", text)

def broken(text):
    return text[99]

def nothing(text):
    return None

def spoken(text):
    return ("de" if "der" in text.split() else "en", 0.5 if "?" in text else 0.9)

def letter(text):
    return text[:1]

number = 7
"""


@pytest.fixture
def function(tmp_path, monkeypatch, request):
    """The name of a function in a module beside the current folder, another module in each test."""
    name = f"my_stages_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return lambda attribute: f"{name}:{attribute}"


def test_regex_drops_and_keeps():
    texts = ["lorem ipsum dolor", "real text", "LOREM IPSUM"]
    drop = Regex(name="regex", patterns=["(?i)lorem ipsum", "javascript"], action="drop")
    left, report = judged(drop, *texts)
    assert left == [None, "real text", None]
    assert report["counts"] == {"(?i)lorem ipsum": 2}
    keep = Regex(name="regex", patterns=["(?i)lorem ipsum", "javascript"], action="keep")
    assert judged(keep, *texts)[0] == ["lorem ipsum dolor", None, "LOREM IPSUM"]


def test_regex_replaces_one_pattern_after_another():
    patterns = [r"(\d+) USD", r"(\d+) dollars"]
    stage = Regex(name="regex", patterns=patterns, action="replace", replacement=r"$\1")
    left, report = judged(stage, "5 USD and 6 USD, 7 dollars", "nothing", "$1")
    assert left == ["$5 and $6, $7", "nothing", "$1"]
    assert report["counts"] == {r"(\d+) USD": 2, r"(\d+) dollars": 1}
    assert report["changed"] == 1


def test_function_drops_and_changes(function):
    left, report = judged(UserFunction(name="function", function=function("short")), "short", "much too long")
    assert left == ["short", None]
    assert report["counts"] == {function("short"): 1}
    left, report = judged(UserFunction(name="function", function=function("tidy")), "a  b", "a b")
    assert left == ["a b", "a b"]
    assert (report["changed"], report["seen_bytes"]) == (1, 7)


def test_numpy_truth_is_truth():
    stage = UserFunction(name="function", function="numpy:any")
    assert isinstance(np.any("x"), np.bool_)
    assert judged(stage, "x", "")[0] == ["x", None]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("broken", r"docs.jsonl:1: stage function failed: IndexError: string index out of range"),
        ("nothing", r"docs.jsonl:1: stage function: my_stages_\d+:nothing returned None; expected true, false or a"),
        ("absent", r"function my_stages_\d+:absent: my_stages_\d+ has no function absent"),
        ("number", r"my_stages_\d+ has int, not a function, number"),
    ],
)
def test_a_function_that_does_not_do_is_named_with_the_document(function, attribute, message):
    with pytest.raises(UserError, match=message):
        judged(UserFunction(name="function", function=function(attribute)), "text")


def test_a_module_may_change_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    (tmp_path / "my_path_stages.py").write_text("import sys\nsys.path.insert(0, '/mine')\ndef f(text): return True\n")
    assert judged(UserFunction(name="function", function="my_path_stages:f"), "text")[0] == ["text"]
    assert sys.path == ["/mine", *before]


def test_a_module_that_is_not_there():
    with pytest.raises(UserError, match=r"no_such_module cannot be imported: ModuleNotFoundError"):
        judged(UserFunction(name="function", function="no_such_module:f"), "text")


def test_language(function):
    texts = ["der Hund", "the dog", "der ?", "dog?"]
    german = Language(name="language", function=function("spoken"), languages=["de"])
    left, report = judged(german, *texts)
    assert left == ["der Hund", None, "der ?", None]
    assert report["counts"] == {"language en": 2}
    assert report["samples"][0]["reason"] == "language en: en 0.9"
    sure = Language(name="language", function=function("spoken"), languages=["de", "en"], min_score=0.8)
    assert judged(sure, *texts)[0] == ["der Hund", "the dog", None, None]
    assert judged(Language(name="language", function=function("short")), "short", "much too long")[0] == ["short", None]
    assert judged(Language(name="language", function=function("letter"), languages=["a"]), "ab", "b")[0] == ["ab", None]
    with pytest.raises(UserError, match=r"docs.jsonl:1: stage language: .* returned None; expected a language"):
        judged(Language(name="language", function=function("nothing")), "text")


def test_a_changed_function_is_seen(function, tmp_path):
    stages = [UserFunction(name="function", function=function("short"))]
    before = describe_stages(stages)
    assert before == describe_stages(stages)
    file = tmp_path / f"{function('short').partition(':')[0]}.py"
    file.write_text(file.read_text().replace("< 10", "< 11"))
    assert describe_stages(stages) != before
