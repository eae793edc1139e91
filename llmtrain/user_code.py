"""Functions of a user's own that recipes name, `package.module:function`."""

import contextlib
import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any


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
