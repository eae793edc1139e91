"""Which keys of several recipes are not the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.redaction import redact

MISSING = "-"
"""What stands for a key that a recipe does not have."""
_ALWAYS_DIFFERENT = ("run_name", "autoresume")
"""Keys that say nothing about what was trained."""


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each recipe, for the keys that differ; secrets are masked.

    Lists are compared as wholes, unless they have as many items everywhere. Paths that differ by the run's name alone
    do not differ.
    """
    flat = [_flat(_without_name(recipe)) for recipe in recipes]
    masked = [_flat(redact(_without_name(recipe))) for recipe in recipes]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    found = {}
    for key in keys:
        values = [one.get(key, MISSING) for one in flat]
        if key.split(".")[0] not in _ALWAYS_DIFFERENT and any(value != values[0] for value in values[1:]):
            found[key] = [one.get(key, MISSING) for one in masked]
    return found


def _without_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, with {run_name} where its name stands in a text."""
    name = recipe.get("run_name")

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): changed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [changed(item) for item in value]
        return value.replace(f"/{name}/", "/{run_name}/") if isinstance(value, str) and name else value

    return {str(key): changed(value) for key, value in recipe.items()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested blocks and lists of blocks as dotted keys; empty blocks and lists of values stay values."""
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        inner = [(_label(item, number), item) for number, item in enumerate(value)]
    if not inner:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in inner:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _label(item: Any, number: int) -> str:
    """A list's item by its label where it has one, so that an added evaluation does not shift the others."""
    label = item.get("label") if isinstance(item, Mapping) else None
    return label if isinstance(label, str) and label else str(number)
