"""YAML that others wrote, as plain data: no tags, and limits on size, depth and what aliases unfold to. Light.

Training, evaluation and data recipes are read by `llmtrain.config.load`, on top of this; everything else comes here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmtrain.errors import UserError

MAX_BYTES = 2_000_000
"""A file of tasks may be long; anything larger is another kind of file."""
MAX_NODES = 200_000
"""Values that a document may unfold to: a few lines of nested aliases (`*name`) make billions."""
MAX_DEPTH = 100
"""Blocks inside blocks."""
LONGEST_NUMBER = 100
"""Characters. Python's time for a number grows with the square of its length, and `1:1:1` is one, too."""
LONGEST_INTERPOLATION, MAX_INTERPOLATIONS = 10_000, 100
"""Characters of text with `${`, and how often it may stand there: its grammar is read slowly, and by recursion."""
NOT_A_VALUE = (ValueError, ArithmeticError, AttributeError, KeyError, TypeError)
"""What PyYAML raises for text that has a tag of something else: `!!bool maybe`, a date that is none."""


class YAMLMistake(UserError):
    """A YAML file cannot be used; names the file and the line."""


def read_yaml(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a YAML file.

    Raises:
        YAMLMistake: it cannot be read, is too large, is not YAML, has tags, unfolds to too much, or has a key twice.
    """
    return parse_yaml(read_text(path, max_bytes=max_bytes), str(path))


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a YAML file.

    Raises:
        YAMLMistake: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise YAMLMistake(f"{path}: {size:,} bytes, and {max_bytes:,} is the most. Is this the right file?")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise YAMLMistake(f"{path}: not UTF-8 text (byte {error.start}). Is this a YAML file?") from None
    except OSError as error:
        raise YAMLMistake(f"{path}: cannot be read: {error.strerror}.") from None


def parse_yaml(text: str, source: str) -> Any:
    """The content of YAML text; `source` is its file, for messages.

    Raises:
        YAMLMistake: as `read_yaml`, but for the file.
    """
    root = parse_tree(text, source)
    for node in unfolded(root, source):
        refuse_scalar(node, source)
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node, source)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:  # a tag, or a key that cannot be one
        raise YAMLMistake(syntax(error, source)) from None
    except (*NOT_A_VALUE, RecursionError) as error:
        raise YAMLMistake(f"{source}: not valid YAML: {error}") from None


def parse_tree(text: str, source: str) -> yaml.Node | None:
    """The nodes of YAML text, with their tags and lines; None for an empty document.

    Raises:
        YAMLMistake: it is not YAML, or nested too deeply.
    """
    try:
        refuse_depth(text, source)
        root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise YAMLMistake(syntax(error, source)) from None
    except RecursionError:
        raise YAMLMistake(f"{source}: nested too deeply.") from None
    return root


def refuse_depth(text: str, source: str) -> None:
    """Refuse blocks inside blocks inside blocks, before anything follows them by recursion.

    Raises:
        yaml.YAMLError: it is not YAML.
        YAMLMistake: it is nested more than `MAX_DEPTH` deep.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark is not None else "?"
                raise YAMLMistake(f"{source}:{line}: nested more than {MAX_DEPTH} levels deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def unfolded(root: yaml.Node | None, source: str) -> Iterator[yaml.Node]:
    """Each node, once for each place where an alias puts it.

    Raises:
        YAMLMistake: there are more than `MAX_NODES`, or an alias holds itself.
    """
    waiting = [root] if root is not None else []
    count = 0
    while waiting:
        node = waiting.pop()
        count += 1
        if count > MAX_NODES:
            line = node.start_mark.line + 1
            raise YAMLMistake(f"{source}:{line}: it unfolds to more than {MAX_NODES:,} values. Use fewer aliases.")
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def refuse_scalar(node: yaml.Node, source: str) -> None:
    """Refuse a value that takes minutes to read.

    Raises:
        YAMLMistake: it is a number of too many digits, or text of too many interpolations.
    """
    if not isinstance(node, yaml.ScalarNode):
        return
    line, length = node.start_mark.line + 1, len(node.value)
    if length > LONGEST_NUMBER and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        raise YAMLMistake(f"{source}:{line}: a number of {length:,} characters.")
    count = node.value.count("${")
    if count > MAX_INTERPOLATIONS or (count and length > LONGEST_INTERPOLATION):
        raise YAMLMistake(f"{source}:{line}: {count:,} interpolations (`${{`) in {length:,} characters of text.")


def _refuse_twice(node: yaml.MappingNode, source: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise YAMLMistake(
                f"{source}:{line}: `{key.value}` is written twice in one block, first in line {seen[key.value]}; YAML "
                "would drop one silently. Keep one."
            )
        seen[key.value] = line


def syntax(error: yaml.YAMLError, source: str) -> str:
    """A parser's complaint as one line with the place."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{source}:{mark.line + 1}" if mark is not None else source
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "could not determine a constructor" in problem:
        problem = problem.replace("could not determine a constructor for the tag", "a tag, which is not read:")
    return f"{place}: not valid YAML: {problem}."
