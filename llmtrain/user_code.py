"""Functions of a user's own that recipes name, `package.module:function`."""

import contextlib
import hashlib
import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.trust import require


def run_code_paths(paths: Sequence[str] | None) -> None:
    """Run the Python files of a recipe's `code_paths`, in their order (they may register components).

    Raises:
        UserError: there is no such file, or nobody said that it may run. Then none of them has run.
    """
    for path in paths or ():
        if not Path(path).is_file():
            raise UserError(f"code_paths: there is no file {path!r}")
    for path in paths or ():
        require("code_paths", path, what="this Python file", files=[Path(path)])
    for path in paths or ():
        runpy.run_path(path)


def import_module(name: str) -> Any:
    """Import a module; one in the current folder is found, too: an installed command does not look there itself."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name != name.partition(".")[0]:
            raise
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        with contextlib.suppress(ValueError):  # the module may change the path, too
            sys.path.remove(here)


def files_digest(function: Any) -> str:
    """Changes with the file of a function, or of the class of an object that can be called: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    parts = (function, inspect.unwrap(function), getattr(function, "func", None))  # `func` is a partial's
    for file in sorted({file for part in parts if (file := _file_of(part))}):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def _file_of(function: Any) -> str | None:
    for each in (function, type(function)):
        with contextlib.suppress(TypeError, OSError):  # a built-in, or a file that is gone
            file = inspect.getsourcefile(each)
            if file is not None and Path(file).is_file():
                return file
    return None
