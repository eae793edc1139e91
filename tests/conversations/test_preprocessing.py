import subprocess
import sys

import pytest

from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import BadExample, Chat, Message, PromptResponse
from llmtrain.conversations.preprocessing import identity, register, registered, resolve
from llmtrain.errors import UserError

MODULE = """
from llmtrain.conversations.messages import PromptResponse

def as_mapping(row):
    return {"prompt": row["q"] + "?", "response": row["a"]}

def as_example(row):
    return PromptResponse(row["q"], row["a"])

def wrong(row):
    return [row["q"], row["a"]]

NUMBER = 3
"""


@pytest.fixture
def beside_the_recipe(tmp_path, monkeypatch):
    """A package of the user's in the working directory."""
    package = tmp_path / "my_functions"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "prep.py").write_text(MODULE)
    (package / "broken.py").write_text("import no_such_module_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    before = set(sys.modules)
    yield package
    for name in set(sys.modules) - before:
        if name.startswith("my_functions"):
            del sys.modules[name]


def test_import_paths(beside_the_recipe):
    row = {"q": "why", "a": "so"}
    assert parse(resolve("my_functions.prep:as_mapping")(row)) == PromptResponse("why?", "so")
    assert parse(resolve("my_functions.prep.as_example")(row)) == PromptResponse("why", "so")


def test_what_a_users_function_raises_is_a_bad_example(beside_the_recipe):
    with pytest.raises(BadExample, match=r"preprocessing failed: my_functions.prep:as_mapping: KeyError: 'a'"):
        resolve("my_functions.prep:as_mapping")({"q": "why"})
    with pytest.raises(BadExample, match="returned list, not a mapping"):
        resolve("my_functions.prep:wrong")({"q": "why", "a": "so"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_functions.prep:nothing", "has no function 'nothing'"),
        ("my_functions.prep:NUMBER", "has int, not a function, 'NUMBER'"),
        ("my_functions.missing:f", "'my_functions.missing' cannot be imported"),
        ("my_functions.broken:f", "no_such_module_anywhere"),
        ("alpacca", r"neither package\.module:function nor registered \(.*alpaca"),
        ("who/knows", "neither"),
        ({"prompt": "q"}, "prompt and response, or messages; found prompt"),
        ({"question": "q", "response": "a"}, "found question, response"),
    ],
)
def test_mistakes(beside_the_recipe, name, message):
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_column_mapping():
    assert resolve({"response": "a", "prompt": "q"})({"q": 1, "a": 2, "x": 3}) == {"response": 2, "prompt": 1}
    chat = {"dialog": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert parse(resolve({"messages": "dialog"})(chat)) == Chat((Message("user", "x"), Message("assistant", "y")))
    with pytest.raises(BadExample, match="no a; the row has q"):
        resolve({"prompt": "q", "response": "a"})({"q": 1})


def test_default_of_a_dataset():
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b"}
    assert isinstance(resolve(None, default_for="Anthropic/hh-rlhf")(row), Chat)
    assert resolve(None, default_for="somebody/else")(row) is row
    assert resolve(None)(row) is row
    assert isinstance(resolve("hh-rlhf", default_for="teknium/OpenHermes-2.5")(row), Chat)
    prompt_and_response = {"prompt": "a", "response": "b"}
    assert resolve(None, default_for="mosaicml/dolly_hhrlhf")(prompt_and_response) is prompt_and_response


def test_register():
    @register("tests/only", default_for=("tests/set",))
    def upper(row):
        return {"prompt": row["p"].upper(), "response": row["r"]}

    assert resolve(None, default_for="tests/set")({"p": "a", "r": "b"})["prompt"] == "A"
    assert "tests/only" in registered()


def test_identity_is_stable_and_follows_the_file(beside_the_recipe):
    first = identity("my_functions.prep:as_mapping")
    assert first == identity("my_functions.prep:as_mapping") != identity("my_functions.prep:as_example")
    code = "from llmtrain.conversations.preprocessing import identity; print(identity('my_functions.prep:as_mapping'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == first
    (beside_the_recipe / "prep.py").write_text(MODULE + "\n# another version\n")
    assert identity("my_functions.prep:as_mapping") != first
    assert identity(None) == identity(None, default_for="somebody/else") == "none"
    assert identity(None, default_for="Anthropic/hh-rlhf") == identity("hh-rlhf")
    assert identity({"prompt": "a", "response": "b"}) == identity({"response": "b", "prompt": "a"})
    assert identity({"prompt": "a", "response": "b"}) != identity({"prompt": "b", "response": "a"})


@pytest.mark.parametrize("made", ["Reader()", "functools.partial(Reader.read, None)"])
def test_identity_follows_the_file_of_what_is_no_plain_function(tmp_path, monkeypatch, made):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LLMTRAIN_TRUST_CODE", "1")
    name = f"reader_{len(made)}"
    file = tmp_path / f"{name}.py"
    code = "import functools\nclass Reader:\n    def read(self, row): return row\n    __call__ = read\n"
    file.write_text(f"{code}apply = {made}\n")
    first = identity(f"{name}:apply")
    file.write_text(f"{code}apply = {made}  # other\n")
    assert identity(f"{name}:apply") != first
