"""Where the output of a preparation lives before it is finished."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

PLAN = "plan.json"
"""The working file without which all others count for nothing."""
OUTPUT = "output"
"""The lock of a whole output: alone to change it, shared to add partitions to it."""


class Work(Protocol):
    """Files by name (`plan.json`, `done/tokens/00012.json`) that no reader of the output sees before `publish`.

    Every method may be called by several processes at once, on several machines; what one has written, all see.
    """

    def read(self, name: str) -> bytes | None:
        """A small working file, or None when there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write a working file: afterwards it is there as a whole, or not at all."""

    def names(self, folder: str) -> set[str]:
        """The names of the working files directly below a folder; empty when there is none."""

    def local(self, folder: str) -> Path:
        """A folder of the output (`tokenizer`) as a folder on this machine, to read."""

    def temporary(self) -> AbstractContextManager[Path]:
        """An empty folder of this process, deleted at the end; on the output's own disk where that is local."""

    def commit(self, files: Mapping[str, Path], marker: str, content: bytes) -> None:
        """Bring files to their places in the output, each as a whole, and then write the working file `marker`.

        Doing it again with the same files changes nothing.

        Args:
            files: place in the output (`train/shard.00012.00000.mds`) -> file in a folder of `temporary`.
            marker: working file that says that they are there.
            content: of the marker.
        """

    def lock(self, name: str, *, shared: bool = False, wait: bool = False) -> AbstractContextManager[None]:
        """Hold a lock while the block runs.

        Args:
            name: of the lock.
            shared: with others that hold it shared.
            wait: until it is free; otherwise it is an error when it is not.

        Raises:
            UserError: another process holds it; says which, where that is known.
        """

    def publish(self, files: Mapping[str, bytes]) -> None:
        """Write the last files of the output (`train/index.json`, `prep.json`), in this order, and make it visible.

        Working files are gone afterwards.
        """

    def amend(self, files: Mapping[str, bytes]) -> None:
        """Replace small files of the finished output, in this order, each as a whole."""

    def published(self, name: str) -> bytes | None:
        """A small file of the finished output (`prep.json`), or None when there is none."""

    def occupied(self) -> bool:
        """Whether there is anything at the output's place, be it finished, older, or somebody else's."""

    def repair(self) -> None:
        """Finish what a process that was killed in `publish` left; only under the lock of the whole output."""

    def is_clean(self) -> bool:
        """Whether `repair` has nothing to do where the output is finished."""

    def discard(self) -> None:
        """Delete everything that is unfinished."""
