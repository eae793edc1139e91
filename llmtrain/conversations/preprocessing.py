"""Functions that bring the rows of a dataset into a known shape: registered ones, a user's own, and column mappings."""

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llmtrain.conversations.messages import BadExample, Chat, Example, PromptResponse, Tokenized
from llmtrain.errors import UserError
from llmtrain.trust import files_of_module, require
from llmtrain.user_code import files_digest, import_module

Preprocess = Callable[[Mapping[str, Any]], Mapping[str, Any] | Example]
_F = TypeVar("_F", bound=Preprocess)

_REGISTERED: dict[str, Preprocess] = {}
_DEFAULTS: dict[str, str] = {}
_OURS = "llmtrain.conversations.adapters"
"""Modules whose functions may be named without `--trust-code`."""
_MAPPINGS = ({"prompt", "response"}, {"prompt", "completion"}, {"messages"}, {"conversations"})


def register(*names: str, default_for: tuple[str, ...] = ()) -> Callable[[_F], _F]:
    """Make a function known under some names, for `preprocessing_fn: NAME`.

    Args:
        names: what a recipe writes.
        default_for: datasets (`hf_name`) that it is applied to when the recipe names no function.
    """

    def keep(function: _F) -> _F:
        for name in names:
            _REGISTERED[name] = function
        _DEFAULTS.update(dict.fromkeys(default_for, names[0]))
        return function

    return keep


def registered() -> list[str]:
    """The registered names, sorted."""
    _load_adapters()
    return sorted(_REGISTERED)


def resolve(preprocessing_fn: str | Mapping[str, str] | None, default_for: str | None = None) -> Preprocess:
    """The function that a recipe means. What it returns is for `formats.parse`.

    Args:
        preprocessing_fn: a registered name, `package.module:function` (or all dots), a mapping of columns
            (`{prompt: question, response: answer}`, `{messages: dialog}`), or None.
        default_for: name of the dataset (`hf_name`); some have a function that is taken when none is given.

    Returns:
        A function of a row. It raises `BadExample` alone: what a user's function raises becomes one.

    Raises:
        UserError: there is no such function.
    """
    name = _name(preprocessing_fn, default_for)
    if name is None:
        return _unchanged
    if isinstance(name, Mapping):
        return _mapped(name)
    return _guarded(_function(name), name)


def identity(preprocessing_fn: str | Mapping[str, str] | None, default_for: str | None = None) -> str:
    """What decides the result of preprocessing, as text: for the keys of caches. Changes with the function's file.

    Raises:
        UserError: there is no such function.
    """
    name = _name(preprocessing_fn, default_for)
    if name is None:
        return "none"
    if isinstance(name, Mapping):
        return "columns " + json.dumps(dict(name), sort_keys=True)
    function = _function(name)
    return f"{name} {files_digest(function)}"


def _name(given: str | Mapping[str, str] | None, default_for: str | None) -> str | Mapping[str, str] | None:
    if given is None and default_for is not None:
        _load_adapters()
        return _DEFAULTS.get(default_for)
    return given


def _unchanged(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row


def _mapped(columns: Mapping[str, str]) -> Preprocess:
    if set(columns) not in _MAPPINGS:
        raise UserError(
            f"preprocessing_fn: a mapping has the keys prompt and response, or messages; found {', '.join(columns)}"
        )

    def take(row: Mapping[str, Any]) -> Mapping[str, Any]:
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise BadExample("missing keys", f"no {', '.join(missing)}; the row has {', '.join(map(str, row))}")
        return {key: row[column] for key, column in columns.items()}

    return take


def _guarded(function: Preprocess, name: str) -> Preprocess:
    def apply(row: Mapping[str, Any]) -> Mapping[str, Any] | Example:
        try:
            made = function(row)
        except (BadExample, UserError):
            raise
        except Exception as problem:
            raise BadExample("preprocessing failed", f"{name}: {type(problem).__name__}: {problem}") from problem
        if not isinstance(made, Mapping | Chat | PromptResponse | Tokenized):
            raise BadExample("preprocessing failed", f"{name} returned {type(made).__name__}, not a mapping")
        return made

    return apply


def _function(name: str) -> Preprocess:
    _load_adapters()
    if name in _REGISTERED:
        return _REGISTERED[name]
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not attribute or "/" in name:
        known = ", ".join(sorted(_REGISTERED))
        raise UserError(f"preprocessing_fn: {name!r} is neither package.module:function nor registered ({known})")
    if not module_name.startswith(_OURS):
        require("preprocessing_fn", name, what="a function of this module", files=files_of_module(module_name))
    try:
        module = import_module(module_name)
    except Exception as problem:  # importing runs any code
        reason = f"{type(problem).__name__}: {problem}"
        raise UserError(f"preprocessing_fn: {name!r}: module {module_name!r} cannot be imported: {reason}") from problem
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "no function" if function is None else f"{type(function).__name__}, not a function,"
        raise UserError(f"preprocessing_fn: {name!r}: module {module_name!r} has {what} {attribute!r}")
    if module_name.startswith(_OURS) and not str(getattr(function, "__module__", "")).startswith(_OURS):
        raise UserError(f"preprocessing_fn: {name!r}: {attribute!r} is no function of {module_name} itself")
    return function  # type: ignore[no-any-return]


def names_foreign_code(preprocessing_fn: str) -> bool:
    """Whether a recipe's `preprocessing_fn` is imported from somewhere else than llmtrain."""
    _load_adapters()
    return preprocessing_fn not in _REGISTERED and not preprocessing_fn.startswith(_OURS)


def _load_adapters() -> None:
    importlib.import_module("llmtrain.conversations.adapters")
    importlib.import_module("llmtrain.conversations.adapters_foundry")
