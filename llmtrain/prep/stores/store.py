"""What a storage has to be able to do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol


class StoredFile(NamedTuple):
    """A file as the storage describes it."""

    path: str
    """Within the store."""
    size: int
    """Bytes."""
    mtime: int
    """When it was last changed, in nanoseconds by the storage's clock; 0 where it does not say."""
    version: str
    """Changes when the content does (ETag, generation)."""


class Changed(Exception):
    """A file is not the version any more that was asked for."""


class Store(Protocol):
    """A bucket, a container or a server. Its methods may be called by several threads.

    Each makes one attempt and raises

        FileNotFoundError: there is no such file, or no such bucket.
        PermissionError: trying again will not help: no or wrong credentials, a host key that is not known, ...
        OSError: anything else; trying again may help.
    """

    def stat(self, path: str) -> StoredFile:
        """Describe a file."""

    def files(self, prefix: str, depth: int | None = None) -> Iterator[StoredFile]:
        """All files whose path begins with a prefix.

        Args:
            prefix: of a path, not necessarily at the border of a folder.
            depth: the deepest files that are of interest have so many slashes after the prefix; where a listing goes
                folder by folder, no deeper folder is listed.
        """

    def read(self, file: StoredFile, start: int, length: int) -> bytes:
        """Some of a file's bytes, at least one and at most `length`, from an offset that lies within the file.

        Raises:
            Changed: it is not that version any more.
        """

    def put(self, path: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """Write a file, from bytes or a local file: afterwards it is there as a whole, or as it was before.

        Args:
            path: where.
            content: bytes, or the path of a local file.
            sent: told how many bytes of a local file have gone since the last call, where the client tells.
        """

    def remove(self, path: str) -> None:
        """Delete a file; one that is not there is no mistake."""

    def prune(self, folder: str, *, leftovers: bool = False) -> None:
        """Delete the empty folders below a folder, and itself when it is empty, where a storage has such things.

        Args:
            folder: where to begin.
            leftovers: delete what interrupted calls of `put` left there, too; only when nobody is writing.
        """
