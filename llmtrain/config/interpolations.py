"""Interpolations (`${key}`) of recipes: none calls a function, and none unfolds to more than a recipe can be."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.base import Container, Node
from omegaconf.errors import OmegaConfBaseException

from llmtrain.config.positions import MAX_NODES, Path

MAX_CHARACTERS = 1_000_000
"""Of the text that all interpolations of a recipe together stand for: what a recipe's file may have."""

NO_RESOLVERS = (
    "Recipes know `${key}` only. They do not read the environment (`${oc.env:...}`), because it holds secrets and"
    " recipes are logged and stored with checkpoints: pass the value on the command line, `key=value`."
)
_SIMPLE = re.compile(r"\$\{[^{}$:]*\}")


class Unfolded(OmegaConfBaseException):
    """Interpolations have unfolded to too much."""


class Budget:
    """What interpolations may still unfold to. A few lines, each with ten of the line before, make billions."""

    def __init__(self) -> None:
        self._values = MAX_NODES
        self._characters = MAX_CHARACTERS

    @property
    def is_spent(self) -> bool:
        """Whether they have unfolded to too much."""
        return self._values < 0 or self._characters < 0

    def take(self, value: object) -> None:
        """Counts a value that an interpolation stands for.

        Raises:
            Unfolded: that was too much.
        """
        self._values -= 1
        if isinstance(value, str):
            self._characters -= len(value)
        if self.is_spent:
            raise Unfolded(f"Interpolations unfold to more than {MAX_NODES:,} values or {MAX_CHARACTERS:,} characters")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts whatever OmegaConf resolves inside; it has no limit of its own, and calls itself."""
        patched: Any = Container
        resolve = patched._resolve_node_interpolation

        def counted(container: Container, *args: Any, **kwargs: Any) -> Node:
            self.take(None)
            node: Node = resolve(container, *args, **kwargs)
            if not isinstance(node, Container):
                self.take(node._value())
            return node

        patched._resolve_node_interpolation = counted
        try:
            yield
        finally:
            patched._resolve_node_interpolation = resolve

    def plain(self, value: Any) -> Any:
        """Plain data of what an interpolation stands for."""
        self.take(value)
        if isinstance(value, DictConfig):
            return {key: self.plain(value[key]) for key in value}
        if isinstance(value, ListConfig):
            return [self.plain(item) for item in value]
        return value


def without_resolvers(node: DictConfig | ListConfig, raw: Any, path: Path) -> dict[Path, str]:
    """Takes the values that call a resolver out of a document, so that none is called through another key either."""
    found: dict[Path, str] = {}
    for key, written in raw.items() if isinstance(raw, dict) else enumerate(raw):
        here = (*path, str(key))
        if isinstance(written, (dict, list)):
            inside = node._get_node(key)
            if isinstance(inside, (DictConfig, ListConfig)):
                found |= without_resolvers(inside, written, here)
        elif _calls_resolver(written):
            found[here] = written
            node[key] = ""
    return found


def _calls_resolver(text: object) -> bool:
    """Whether text holds `${name:...}`, which calls a function, rather than `${key}`, which takes a value."""
    if not isinstance(text, str) or "${" not in text:
        return False
    text = text.replace("\\\\", "").replace("\\${", "")  # escaped: the text itself
    while _SIMPLE.search(text):
        text = _SIMPLE.sub("", text)
    return "${" in text and ":" in text
