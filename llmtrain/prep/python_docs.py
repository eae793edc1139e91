"""Conversations out of Python files: what a docstring says of a function, and what its examples print.

The files are parsed, never imported or run. The same files give the same conversations.
"""

import ast
import doctest
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmtrain.conversations.messages import Chat, Message
from llmtrain.errors import UserError

VERSION = 2
"""Goes up when the same files give other conversations: data of an earlier version is then told from today's."""

_MAX_ANSWER = 600  # characters; a longer first paragraph is a manual page, not an answer
_MIN_WORDS = 3  # "See above." teaches nothing
_MAX_SESSION = 300  # characters of a conversation of examples: digits and signs take a token for every two
_DIRECTIVE = re.compile(r"[ \t]*#[ \t]*doctest:.*")
_QUESTIONS = {
    "function": (
        "What does `{name}` do?",
        "Explain what the function `{name}` does.",
        "I found `{name}` in some Python code. What does it do?",
        "Describe `{name}` in a sentence or two.",
    ),
    "method": (
        "What does `{name}` do?",
        "Explain what the method `{name}` does.",
        "I found `{name}` in some Python code. What does it do?",
        "Describe `{name}` in a sentence or two.",
    ),
    "class": (
        "What is `{name}`?",
        "Explain what the class `{name}` is for.",
        "I found `{name}` in some Python code. What is it?",
        "Describe `{name}` in a sentence or two.",
    ),
}


class Found(NamedTuple):
    """A conversation out of a file."""

    name: str
    """Qualified name of what has the docstring: `shutil.copytree`."""
    line: int
    """Line in the file."""
    chat: Chat
    """The conversation."""


class _Documented(NamedTuple):
    name: str
    kind: str
    line: int
    text: str


def module_name(path: str) -> str:
    """`json/__init__.py` -> `json`."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def docstring_pairs(path: Path, module: str) -> Iterator[Found]:
    """A question about each public function, class and method of a file, with its docstring's first paragraph.

    White space is normalised. The question's wording is chosen by a hash of the name, so that it does not give away
    the answer. Left out: private names, paragraphs of under three words or over 600 characters, and those with code.

    Raises:
        UserError: it is not Python.
    """
    if any(part.startswith("_") for part in module.split(".")):
        return
    for found in _documented(path, module):
        answer = " ".join(found.text.split("\n\n")[0].split())
        wordings = _QUESTIONS.get(found.kind)
        public = not any(part.startswith("_") for part in found.name.split("."))
        says_something = len(answer.split()) >= _MIN_WORDS and len(answer) <= _MAX_ANSWER and ">>>" not in answer
        if wordings is None or not public or not says_something:
            continue
        choice = hashlib.sha256(found.name.encode()).digest()[0] % len(wordings)
        yield Found(found.name, found.line, _chat([(wordings[choice].format(name=found.name), answer)]))


def doctest_sessions(path: Path, module: str) -> Iterator[Found]:
    """The examples of each docstring of a file: the user writes code, the assistant what it prints.

    A dict of texts counts, too: Python keeps its language reference in one (`pydoc_data/topics.py`). Statements that
    print nothing go before the next that does. Of an exception the last line is kept; examples whose output is not
    exact (`...`, an address, `+SKIP`) are left out. A long docstring gives several conversations, each of which begins
    with the statements of the earlier ones that print nothing.

    Raises:
        UserError: it is not Python.
    """
    if b">>>" not in _source(path):  # most files: parsing them is what costs
        return
    for found in _documented(path, module, dicts=True):
        if ">>>" not in found.text:
            continue
        try:
            examples = doctest.DocTestParser().get_examples(found.text)
        except ValueError:  # a docstring that only looks like it
            continue
        for turns in _sessions(examples):
            yield Found(found.name, found.line, _chat(turns))


def _documented(path: Path, module: str, *, dicts: bool = False) -> Iterator[_Documented]:
    """Everything in a file that has a docstring; of several with one name the first (overloads, setters).

    With `dicts` also the texts of the dicts that the module assigns.
    """
    tree = _parse(path)
    text = ast.get_docstring(tree)
    if text:
        yield _Documented(module, "module", 1, text)
    if dicts:
        yield from _texts(tree, module)
    seen: set[str] = set()
    for found in _inside(tree, module, in_class=False):
        if found.name not in seen:
            seen.add(found.name)
            yield found


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem}") from problem


def _parse(path: Path) -> ast.Module:
    source = _source(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            return ast.parse(source, str(path))
    except (SyntaxError, ValueError) as problem:
        raise UserError(f"{path} cannot be parsed as Python ({problem}): exclude it") from problem


def _inside(scope: ast.AST, name: str, *, in_class: bool) -> Iterator[_Documented]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_class = isinstance(node, ast.ClassDef)
            kind = "class" if is_class else "method" if in_class else "function"
            text = ast.get_docstring(node)
            if text:
                yield _Documented(f"{name}.{node.name}", kind, node.lineno, text)
            if is_class:
                yield from _inside(node, f"{name}.{node.name}", in_class=True)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _inside(node, name, in_class=in_class)


def _texts(tree: ast.Module, module: str) -> Iterator[_Documented]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield _Documented(f"{module}.{key.value!s}", "text", key.lineno, value.value)


def _sessions(examples: Sequence[doctest.Example]) -> Iterator[list[tuple[str, str]]]:
    silent: list[str] = []  # all statements so far that print nothing
    waiting: list[str] = []  # those since the last turn
    turns: list[tuple[str, str]] = []
    length = 0
    for example in examples:
        code = _DIRECTIVE.sub("", example.source).strip()
        printed = _printed(example)
        if printed == "":
            silent.append(code)
            waiting.append(code)
            continue
        if printed is None or not code:
            continue
        asked = "\n".join([*waiting, code])
        if turns and length + len(asked) + len(printed) > _MAX_SESSION:
            yield turns
            turns, length = [], 0
            asked = "\n".join([*silent, code])
        waiting = []
        if len(asked) + len(printed) > _MAX_SESSION:
            if not turns:
                return  # what comes before does not fit: from here on nobody could know the answers
            continue
        turns.append((asked, printed))
        length += len(asked) + len(printed)
    if turns:
        yield turns


def _printed(example: doctest.Example) -> str | None:
    """What an example prints; None when that cannot be told exactly."""
    want = example.want.strip("\n").rstrip()
    if example.exc_msg is not None:
        want = example.exc_msg.strip()
    if doctest.SKIP in example.options or "..." in want or " at 0x" in want:
        return None
    return "\n".join("" if line == "<BLANKLINE>" else line for line in want.splitlines())


def _chat(turns: Sequence[tuple[str, str]]) -> Chat:
    messages = [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return Chat(tuple(messages))
