"""What a task file of lm-evaluation-harness could run, and what is done about it without `--trust-code`.

A file may name functions (`!function`), classes, metrics that are fetched from the hub and run, datasets with scripts,
and its templates are Jinja, which the harness renders without a sandbox. A file of data alone needs no trust: its
templates are then rendered in a sandbox.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.safe_yaml import parse_tree, read_text, unfolded
from llmtrain.trust import require, trusted

_KEYS_OF_CODE = ("class", "custom_dataset", "unsafe_code")


def check_files(key: str, files: Sequence[Path]) -> None:
    """Look at task files, and at those that they include, before the harness reads them.

    Args:
        key: of the recipe, for the message.
        files: YAML files.

    Raises:
        UserError: one of them names code and there is no trust, or is no YAML.
    """
    seen: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop().resolve()  # the harness, too, looks for what a link includes where the link leads
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = read_text(file)
        root = parse_tree(text, str(file))
        for _ in unfolded(root, str(file)):  # from here on it may be followed
            pass
        if (found := _code_in(root)) is not None:
            beside = sorted(file.parent.glob("*.py"))
            require(key, file, what=f"code: it says {found}", files=beside)
        waiting += [file.parent / name for name in _includes(root)]


def _code_in(root: yaml.Node | None) -> str | None:
    for node in _nodes(root):
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            return f"`{node.tag} {node.value if isinstance(node.value, str) else ''}`".replace(" `", "`")
    for key, value in _pairs(root):
        if key in _KEYS_OF_CODE and value.value not in ("", "null", "~", "false"):
            return f"`{key}`"
        if key == "hf_evaluate" and not _is_no(value):
            return "`hf_evaluate: true`, a metric of the hub"
        if key == "metric" and isinstance(value.value, str) and value.value not in _known_metrics():
            return f"`metric: {value.value}`, which the harness fetches from the hub"
        if key == "trust_remote_code" and not _is_no(value):
            return "`trust_remote_code`"
        if key == "dataset_path" and value.value == "pandas":
            return "`dataset_path: pandas`, which unpickles files"
    return None


def _is_no(node: yaml.Node) -> bool:
    """Whether it is one of YAML's eleven ways to say no; whatever else it is, it may mean yes."""
    return str(node.value).lower() in ("false", "no", "off")


def _known_metrics() -> Any:
    from lm_eval.api import metrics, registry

    del metrics  # its import registers them
    return registry.METRIC_REGISTRY


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item)


def _pairs(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    for node in _nodes(root):
        if isinstance(node, yaml.MappingNode):
            yield from ((str(key.value), value) for key, value in node.value)


def _includes(root: yaml.Node | None) -> list[str]:
    found = [value for key, value in _pairs(root) if key == "include"]
    nodes = [part for value in found for part in _nodes(value) if isinstance(part, yaml.ScalarNode)]
    return [str(node.value) for node in nodes]


@contextlib.contextmanager
def code_runs_with_trust_only(name: str) -> Iterator[None]:
    """While a task is loaded, its data set must not bring code; from now on templates are rendered in a sandbox.

    Args:
        name: of the task, for the message.
    """
    import datasets
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not trusted() and not isinstance(utils.env, SandboxedEnvironment):
        old = utils.env
        utils.env = SandboxedEnvironment(
            loader=old.loader, undefined=old.undefined, keep_trailing_newline=old.keep_trailing_newline
        )
        utils.env.filters.update(old.filters)
    load = datasets.load_dataset

    def guarded(*args: Any, **kwargs: Any) -> Any:
        path = args[0] if args else kwargs.get("path")
        if kwargs.get("trust_remote_code"):
            require(f"harness.tasks: {name}", path, what="this data set's script")
        if path == "pandas":
            require(f"harness.tasks: {name}", path, what="what the pickles of this builder of datasets name")
        return load(*args, **kwargs)

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = trusted()
    datasets.load_dataset = guarded
    try:
        yield
    finally:
        datasets.load_dataset = load
