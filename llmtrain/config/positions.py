"""Where each key of a recipe was written: file and line, or the command line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import yaml

from llmtrain.config.safe_yaml import refuse_depth, refuse_scalar

Path = tuple[str, ...]
"""Keys from the root of the document; list positions are written as their number."""

MAX_NODES = 10_000
"""More than any recipe has, and OmegaConf's own limit: a document that unfolds to more is an alias bomb."""


@dataclass(frozen=True)
class Position:
    """A line of a file (counted from 1), or the command line when `line` is None."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Position("command line")


@dataclass(frozen=True)
class Duplicate:
    """One key, written twice in one block."""

    path: Path
    first: Position
    second: Position


@dataclass
class Positions:
    """The position of every key of a document."""

    source: str
    by_path: dict[Path, Position] = field(default_factory=dict)
    duplicates: list[Duplicate] = field(default_factory=list)
    is_block: bool = True
    """Whether the document is a block of keys (or empty)."""
    visited: int = 0
    """Values that were looked at, once for each place where an alias puts them."""

    def of(self, path: Path) -> Position:
        """The position of `path`, or of the nearest block around it that was written."""
        for end in range(len(path), 0, -1):
            # A single block that stands where a list may stand (`eval_loader`) is validated as item 0 of a list.
            for candidate in (path[:end], tuple(key for key in path[:end] if not key.isdigit())):
                if candidate in self.by_path:
                    return self.by_path[candidate]
        return Position(self.source)

    def override(self, path: Path) -> None:
        """Record that `path`, and all below it, came from the command line."""
        for key in [known for known in self.by_path if known[: len(path)] == path]:
            self.by_path[key] = COMMAND_LINE
        self.by_path[path] = COMMAND_LINE
        for end in range(1, len(path)):  # a block that the override made, where there was nothing or a plain value
            block = path[:end]
            if not any(len(known) > end and known[:end] == block for known in self.by_path if known != path):
                self.by_path[block] = COMMAND_LINE


def find_positions(text: str, source: str) -> Positions:
    """Map every key of a YAML document to its line.

    Args:
        text: The document.
        source: What to call it in messages, usually the path of the file.

    Raises:
        yaml.YAMLError: The text is not YAML; the error carries the line.
        UserError: It is nested too deeply, or a value is longer than any of its kind.
        ValueError: The document unfolds to more than `MAX_NODES` values.
    """
    positions = Positions(source)
    refuse_depth(text, source)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        positions.is_block = isinstance(root, yaml.MappingNode)
        for path, line in _walk(root, (), positions):
            positions.by_path.setdefault(path, Position(source, line))
    return positions


def _walk(node: yaml.Node, path: Path, positions: Positions) -> Iterator[tuple[Path, int]]:
    positions.visited += 1  # here and not by what is yielded: merged blocks may be empty
    if positions.visited > MAX_NODES:
        raise ValueError(f"It unfolds to more than {MAX_NODES:,} values. Use fewer aliases (`*name`).")
    refuse_scalar(node, positions.source)
    if isinstance(node, yaml.MappingNode):
        merged = []
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged.append(value_node)
                continue
            key = str(key_node.value)
            if key in seen:
                source = positions.source
                positions.duplicates.append(
                    Duplicate((*path, key), Position(source, seen[key]), Position(source, line))
                )
                continue
            seen[key] = line
            yield (*path, key), line
            yield from _walk(value_node, (*path, key), positions)
        for value_node in merged:  # keys of the block itself win over merged ones, and were reported first
            blocks = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for block in blocks:
                yield from _walk(block, path, positions)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, str(index)), item.start_mark.line + 1
            yield from _walk(item, (*path, str(index)), positions)


def dotted(path: Path) -> str:
    """``a.b[0].c``, as one writes it on the command line."""
    out = ""
    for key in path:
        out += f"[{key}]" if key.isdigit() else f".{key}" if out else key
    return out


def lookup(data: object, path: Path) -> object:
    """The value at `path`; raises KeyError when there is none."""
    for key in path:
        if isinstance(data, Mapping) and key in data:
            data = data[key]
        elif isinstance(data, (list, tuple)) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
        else:
            raise KeyError(dotted(path))
    return data
