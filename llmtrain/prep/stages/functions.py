"""`function` and `language`: verdicts of a user's own function."""

from collections.abc import Callable
from typing import Any

import numpy as np

from llmtrain.errors import UserError
from llmtrain.prep.stages.config import Language, UserFunction
from llmtrain.prep.stages.step import Change, Drop, Step, Verdict
from llmtrain.trust import files_of_module, require
from llmtrain.user_code import import_module


def resolve(stage: str, name: str) -> Callable[[str], Any]:
    """The function `package.module:function`.

    Raises:
        UserError: there is none, or its module cannot be imported, or nobody said that its code may run.
    """
    module_name, _, attribute = name.partition(":")
    require(f"stages.{stage}.function", name, what="a function of this module", files=files_of_module(module_name))
    try:
        module = import_module(module_name)
    except Exception as problem:  # importing runs any code
        reason = f"{type(problem).__name__}: {problem}"
        raise UserError(f"stage {stage}: function {name}: {module_name} cannot be imported: {reason}") from problem
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "no function" if function is None else f"{type(function).__name__}, not a function,"
        raise UserError(f"stage {stage}: function {name}: {module_name} has {what} {attribute}")
    return function  # type: ignore[no-any-return]


def user_function(config: UserFunction) -> Step:
    """Drops or changes documents as the function says."""
    function = resolve(config.name, config.function)

    def judge(text: str) -> Verdict:
        said = function(text)
        if isinstance(said, str):
            return Change(said, {config.function: 1}) if said != text else None
        if _is_bool(said):
            return None if said else Drop(config.function)
        raise UserError(f"{config.function} returned {said!r}; expected true, false or a text")

    return judge


def language(config: Language) -> Step:
    """Keeps documents whose language is wanted."""
    function = resolve(config.name, config.function)
    wanted = frozenset(config.languages)

    def judge(text: str) -> Verdict:
        said = function(text)
        if _is_bool(said):
            return None if said else Drop(config.function)
        found, score = said if isinstance(said, tuple) and len(said) == 2 else (said, None)
        if not isinstance(found, str) or not (score is None or isinstance(score, int | float)):
            raise UserError(
                f"{config.function} returned {said!r}; expected a language, (language, score), or true or false"
            )
        shown = found if score is None else f"{found} {score:.3g}"
        if wanted and found not in wanted:
            return Drop(f"language {found}", shown)
        if score is not None and score < config.min_score:
            return Drop(f"score below {config.min_score:g}", shown)
        return None

    return judge


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_)
