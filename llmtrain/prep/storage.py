"""Files of a recipe that lie elsewhere: `s3://`, `gs://`, `azure://`, `sftp://`."""

import glob
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from llmtrain.errors import UserError
from llmtrain.prep.stores.open import open_store
from llmtrain.prep.stores.remote_file import RemoteFile
from llmtrain.prep.stores.retry import persistently
from llmtrain.prep.stores.store import Changed, StoredFile
from llmtrain.redaction import without_password


class FileInfo(NamedTuple):
    """A file that a pattern matches."""

    url: str
    """URL, or path on this machine."""
    size: int
    """Bytes."""
    mtime: int
    """When it was last changed, in nanoseconds; 0 where the storage does not say."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, not a path on this machine."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)))


def glob_files(pattern: str) -> list[FileInfo]:
    """The files that a pattern matches (`*`, `?`, `[...]`; `**` for any number of folders), sorted by name.

    As in a shell, wildcards match no name that begins with a dot.

    Raises:
        UserError: the storage cannot be reached or used.
    """
    if not is_remote(pattern):
        names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())  # noqa: PTH207
        return [FileInfo(name, (stat := Path(name).stat()).st_size, stat.st_mtime_ns) for name in names]
    store, root, path = open_store(pattern)
    wanted = _as_regex(path)
    prefix = re.split(r"[*?\[]", path, maxsplit=1)[0]
    depth = None if "**" in path else path.count("/") - prefix.count("/")

    def found() -> list[StoredFile]:
        if prefix == path:
            return [store.stat(path)]
        return sorted(
            file for file in store.files(prefix, depth) if wanted.fullmatch(file.path) and not file.path.endswith("/")
        )

    try:
        files = persistently(found, f"listing {pattern}")
    except FileNotFoundError:
        return []
    return [FileInfo(root + file.path, file.size, file.mtime) for file in files]


def open_input(url: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, seekable; a connection that breaks is made again and goes on where it was.

    Raises:
        OSError: it is on this machine and cannot be opened.
        UserError: it is elsewhere and does not exist or, also while reading, cannot be had or was changed.
    """
    if not is_remote(url):
        return Path(url).open("rb")
    store, _, path = open_store(str(url))
    try:
        file = persistently(lambda: store.stat(path), f"opening {url}")
    except FileNotFoundError as problem:
        raise UserError(f"{without_password(str(url))}: there is no such file") from problem
    return io.BufferedReader(RemoteFile(store, file, str(url)), 1 << 16)


def read_bytes(url: str) -> bytes | None:
    """The content of a small file, which may be written while it is read; None when there is none.

    Raises:
        UserError: the storage cannot be reached or used.
    """
    if not is_remote(url):
        path = Path(url)
        return path.read_bytes() if path.is_file() else None
    store, _, path_there = open_store(url)

    def content() -> bytes:
        file = store.stat(path_there)
        data = b""
        while len(data) < file.size:
            try:
                data += store.read(file, len(data), file.size - len(data))
            except Changed as problem:  # a working file that was written meanwhile: the new one is as good
                raise ConnectionError("it changes faster than it can be read") from problem
        return data

    try:
        return persistently(content, f"reading {url}")
    except FileNotFoundError:
        return None


def names_below(url: str) -> Iterator[str]:
    """The paths of all files below a remote folder, relative to it.

    Raises:
        UserError: the storage cannot be reached or used.
    """
    store, _, path = open_store(url.rstrip("/") + "/")
    try:
        files = persistently(lambda: list(store.files(path)), f"listing {url}")
    except FileNotFoundError:
        return
    for file in files:
        if not file.path.endswith("/"):  # what some tools write for an empty folder
            yield file.path.removeprefix(path)


def _as_regex(path: str) -> re.Pattern[str]:
    """A pattern as a regular expression for whole paths."""
    result = ""
    rest = path
    while rest:
        starts_a_name = not result or result.endswith("/") or result.endswith(_FOLDERS)
        visible = r"(?!\.)" if starts_a_name else ""
        if starts_a_name and rest.startswith("**/"):
            result, rest = result + _FOLDERS, rest[3:]
        elif starts_a_name and rest == "**":
            result, rest = result + _FOLDERS + r"(?!\.)[^/]*", ""
        elif rest[0] == "*":
            result, rest = result + visible + "[^/]*", rest.lstrip("*")
        elif rest[0] == "?":
            result, rest = result + visible + "[^/]", rest[1:]
        elif match := re.match(r"\[(!?)(\]?[^\]]*)\]", rest):
            inside = match[2].replace("\\", r"\\")
            result, rest = result + visible + f"[{'^/' if match[1] else ''}{inside}]", rest[match.end() :]
        else:
            result, rest = result + re.escape(rest[0]), rest[1:]
    return re.compile(result, re.DOTALL)


_FOLDERS = r"(?:(?!\.)[^/]+/)*"
