"""Code that others wrote and a recipe names: it runs with `--trust-code` only, and is named before it runs. Light.

Recipes and checkpoints are data. Where a key would have code run (a file, a function of a module, a modelling file
beside weights, a task of the harness from a file), whoever is about to run it calls `require` right before. So there is
no list of keys to keep complete, and a checkpoint's own recipe is asked the same question as a recipe on disk.

The answer travels in the environment, so that ranks, workers and export processes inherit it.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError

FLAG = "--trust-code"
VARIABLE = "LLMTRAIN_TRUST_CODE"
_SAID = "LLMTRAIN_TRUSTED_CODE_SAID"
"""What was named already, so that workers do not name it again."""
_MOST_FILES = 20


def trusted() -> bool:
    """Whether this process may run code that a recipe or a checkpoint names."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("1", "true", "yes")


def trust() -> None:
    """The user said so: for this process and those that it starts."""
    os.environ[VARIABLE] = "1"


def take_flag(arguments: Sequence[str]) -> list[str]:
    """Arguments without `--trust-code`, which is obeyed."""
    if FLAG in arguments:
        trust()
    return [argument for argument in arguments if argument != FLAG]


def require(key: str, value: object, *, what: str, files: Sequence[Path] = ()) -> None:
    """Call this right before code that a recipe or a checkpoint names is run.

    With trust, one line says what runs, with the first digits of each file's sha256 (once a run, on rank 0).

    Args:
        key: of the recipe (`code_paths`).
        value: what stands there.
        what: what will run, in a few words: "this Python file".
        files: the files of it that are known.

    Raises:
        UserError: there is no trust; names key, value, file and flag.
    """
    named = "".join(f"; {text}" for text in _named(files))
    if not trusted():
        raise UserError(
            f"{key}: {value} would run {what}{named}. Recipes and checkpoints are data, so this needs your word: read "
            f"that code, and if you trust it, give {FLAG} on the command line (or set {VARIABLE}=1)."
        )
    line = f"trusted     {key}: {value} runs {what}{named}"
    mark = hashlib.sha256(line.encode()).hexdigest()[:12]
    said = os.environ.get(_SAID, "").split(",")
    if mark in said:
        return
    os.environ[_SAID] = ",".join([*filter(None, said), mark])
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def require_all(recipe: Mapping[str, Any]) -> None:
    """`require` for a whole recipe, before the time that its run takes to begin.

    Raises:
        UserError: there is no trust, and the recipe needs it; names each key.
    """
    if trusted() or not (found := needed(recipe)):
        return
    raise UserError(
        "this recipe would run code that is not llmtrain's:\n"
        + "".join(f"    {line}\n" for line in found)
        + f"Read that code, and if you trust it, give {FLAG} on the command line (or set {VARIABLE}=1)."
    )


def needed(recipe: Mapping[str, Any]) -> list[str]:
    """What of a recipe would need trust, one line each, by looking at it alone; nothing is imported or opened.

    What only shows when something is opened (a model on the hub that comes with code) is asked for then.

    Args:
        recipe: of training, evaluation or data, as plain data.
    """
    found = []
    for path, value in _leaves(recipe, ()):
        if why := _why(path, value):
            found.append(f"{'.'.join(path)}: {value} ({why})")
    return found


def _why(path: tuple[str, ...], value: object) -> str | None:
    key = path[-1]
    if not value:
        return None
    if len(path) > 1 and path[-2] == "code_paths":
        return "this Python file"
    if key == "trust_remote_code":
        return "the Python code that comes with it"
    if key == "preprocessing_fn" and isinstance(value, str):
        from llmtrain.conversations.preprocessing import names_foreign_code

        return "a function of this module" if names_a_module(value) and names_foreign_code(value) else None
    if key == "function" and isinstance(value, str) and names_a_module(value):
        return "a function of this module"
    if key == "allow_unsafe_types":
        return "what the pickles in the shards name"
    if key == "confirm_run_unsafe_code":
        return "code that the model writes"
    if "include_path" in path[-2:]:
        return "what its tasks name"
    if "harness" in path and "tasks" in path and isinstance(value, str) and is_task_file(value):
        return "what this file of tasks names (functions, templates, metrics)"
    if len(path) > 2 and path[-3:-1] == ("compile_config", "options") and isinstance(value, (str, list)):
        return "a compiler with this option"
    return None


def names_a_module(name: str) -> bool:
    """Whether `preprocessing_fn` names a function by its module (`package.module:function`, or all dots)."""
    return (":" in name or "." in name) and "/" not in name


def is_task_file(name: str) -> bool:
    """Whether a task of the harness is named by its file or folder."""
    return name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_dir()


def files_of_module(name: str) -> list[Path]:
    """The file that `import a.b` would run last, found without running any of it."""
    for folder in [Path(entry or ".") for entry in sys.path] + [Path.cwd()]:
        place = folder.joinpath(*name.split("."))
        for candidate in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if candidate.is_file():
                return [candidate]
    return []


def python_files(folder: str | Path) -> list[Path]:
    """The Python files of a model's folder on this machine; none of a name on the hub."""
    place = Path(folder).expanduser()
    return sorted(place.glob("**/*.py")) if place.is_dir() else []


def _named(files: Sequence[Path]) -> list[str]:
    texts = []
    for file in files[:_MOST_FILES]:
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        except OSError as error:
            digest = f"unreadable: {error.strerror}"
        texts.append(f"{file} (sha256 {digest})")
    return texts + ([f"and {len(files) - _MOST_FILES} more files"] if len(files) > _MOST_FILES else [])


def _leaves(value: object, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], object]]:
    if isinstance(value, Mapping):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, str(key)))]
    if isinstance(value, (list, tuple)):
        if (path and path[-1] == "options") or not all(isinstance(item, (Mapping, str)) for item in value):
            return [(path, value)]
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, str(index)))]
    return [(path, value)] if path else []
