import pytest

from llmtrain.errors import UserError
from llmtrain.prep.python_docs import docstring_pairs, doctest_sessions, module_name

SOURCE = '''
"""Tools for words.

>>> 1 + 1
2
"""

def shout(text):
    r"""Return the text in capital
    letters, loudly.

    And more that nobody asked for: \\d
    >>> from words import shout
    >>> name = "ada"
    >>> shout(name)  # doctest: +NORMALIZE_WHITESPACE
    'ADA'
    >>> print(shout(name) + "\\n\\n" + name)
    ADA
    <BLANKLINE>
    ada
    >>> shout(3)
    Traceback (most recent call last):
        ...
    TypeError: not a text
    >>> shout
    <function shout at 0x7f00>
    >>> shout(random())  # doctest: +SKIP
    'X'
    """

if True:
    async def whisper(text):
        """Say it quietly, please."""
        def inside():
            """This one is not reachable by name."""

def _private():
    """Not for the public, really."""

def short():
    """Too short."""

def undocumented(): pass

def long():
    """%s"""

class Loud(str):
    """A text that shouts."""

    def __init__(self):
        """Make a loud text."""

    @property
    def level(self):
        """How loud it is."""

    @level.setter
    def level(self, value):
        """Set how loud it is."""

    class Inner:
        """A class within a class."""

class _Hidden:
    """A class that is not public."""

    def method(self):
        """A method of a hidden class."""

topics = {"adding": "Add:\\n\\n   >>> 2 + 3\\n   5\\n", "none": "no example"}
''' % ("word " * 200)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.py"
    path.write_text(SOURCE)
    return path


def turns(found):
    return [(message.role, message.content) for message in found.chat.messages]


def test_public_names_are_asked_about_and_first_paragraphs_answer(file):
    found = {pair.name: pair for pair in docstring_pairs(file, "words")}
    answers = {name: turns(pair)[-1] for name, pair in found.items()}
    assert answers == {
        "words.shout": ("assistant", "Return the text in capital letters, loudly."),
        "words.whisper": ("assistant", "Say it quietly, please."),
        "words.Loud": ("assistant", "A text that shouts."),
        "words.Loud.level": ("assistant", "How loud it is."),
        "words.Loud.Inner": ("assistant", "A class within a class."),
    }
    for name, pair in found.items():
        assert turns(pair)[0][0] == "user"
        assert f"`{name}`" in turns(pair)[0][1]
    assert SOURCE.splitlines()[found["words.Loud"].line - 1] == "class Loud(str):"
    assert not list(docstring_pairs(file, "package._private.words"))


def test_wordings_differ_and_stay_the_same(tmp_path):
    path = tmp_path / "many.py"
    path.write_text("\n".join(f'def f{i}():\n    """It does the thing number {i}."""' for i in range(60)))
    asked = [turns(pair)[0][1].replace(pair.name, "NAME") for pair in docstring_pairs(path, "many")]
    assert len(set(asked)) == 4
    assert asked == [turns(pair)[0][1].replace(pair.name, "NAME") for pair in docstring_pairs(path, "many")]


def test_examples_become_turns(file):
    found = {session.name: turns(session) for session in doctest_sessions(file, "words")}
    assert found == {
        "words": [("user", "1 + 1"), ("assistant", "2")],
        "words.shout": [
            ("user", 'from words import shout\nname = "ada"\nshout(name)'),
            ("assistant", "'ADA'"),
            ("user", 'print(shout(name) + "\\n\\n" + name)'),
            ("assistant", "ADA\n\nada"),
            ("user", "shout(3)"),
            ("assistant", "TypeError: not a text"),
        ],
        "words.adding": [("user", "2 + 3"), ("assistant", "5")],
    }


def test_long_docstrings_are_divided_and_each_part_has_its_setup(tmp_path):
    examples = "".join(f">>> x + {i}\n{'9' * 80}\n" for i in range(20))
    path = tmp_path / "long.py"
    path.write_text(f'"""\n>>> x = 1\n{examples}"""')
    parts = [turns(session) for session in doctest_sessions(path, "long")]
    assert len(parts) > 2
    assert [content for part in parts for role, content in part if role == "user"][1] == "x + 1"
    assert all(part[0][1].startswith("x = 1\nx + ") for part in parts)
    assert sum(len(part) for part in parts) == 40
    assert all(sum(len(content) for _, content in part) <= 300 for part in parts)


def test_mistakes(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("print 'hello'")
    with pytest.raises(UserError, match=r"old\.py cannot be parsed as Python .*exclude it"):
        list(docstring_pairs(path, "old"))
    path.write_bytes(b'""">>> 1\n"""\nx = "\xff"')
    with pytest.raises(UserError, match="cannot be parsed"):
        list(doctest_sessions(path, "old"))


@pytest.mark.parametrize(
    ("path", "name"), [("json/__init__.py", "json"), ("json/decoder.py", "json.decoder"), ("abc.py", "abc")]
)
def test_module_name(path, name):
    assert module_name(path) == name
