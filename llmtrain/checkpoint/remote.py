"""A run's checkpoints in a store (S3, GCS, Azure, SFTP): what lies there, and whether it can be used.

`URL/epE-baB/` holds the files of a checkpoint, the manifest last: without it the checkpoint was never finished. Before
the first file comes a marker, which goes when the manifest is there: so what a killed run has left half-sent is known
from another trainer's checkpoints, which are left alone.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import RECORD, Best
from llmtrain.checkpoint.resolve import step_and_epoch
from llmtrain.errors import UserError
from llmtrain.prep.stores.open import open_store
from llmtrain.prep.stores.retry import reason
from llmtrain.prep.stores.store import Changed, StoredFile
from llmtrain.redaction import without_password

UNFINISHED = ".unfinished"
"""The marker in the folder of a checkpoint that is being sent, or deleted."""
SET_ASIDE = ".set-aside"
"""The marker in a checkpoint that the run has gone back behind: nobody continues from it."""
LATEST_RECORD = "latest.json"
"""Tells people which checkpoint has arrived last; llmtrain never reads it."""
LARGEST_MANIFEST = 1 << 26
"""Bytes of a manifest, at most: some 400,000 files."""
PATIENCE = 20.0
"""Seconds for which a store that does not answer is asked again before a run starts."""

Result = TypeVar("Result")


class Unreachable(Exception):
    """The store does not answer, or not as it should; later it may."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """What lies in a store under a checkpoint's name."""

    name: str
    step: int
    """Finished optimizer steps, from the name."""
    epoch: int
    """Finished epochs, from the name."""
    files: Mapping[str, StoredFile]
    """By their names relative to the checkpoint."""

    @property
    def has_manifest(self) -> bool:
        """Whether it was sent to its end."""
        return manifest.MANIFEST in self.files

    @property
    def was_set_aside(self) -> bool:
        """Whether the run has gone back to an earlier checkpoint, because of something that this one has learned."""
        return SET_ASIDE in self.files

    @property
    def is_offered(self) -> bool:
        """Whether a run may continue from it, as far as its files' names tell."""
        return self.has_manifest and not self.was_set_aside

    @property
    def was_cut_off(self) -> bool:
        """Whether llmtrain began to send or to delete it, and did not come to the end."""
        return UNFINISHED in self.files and not self.has_manifest

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files.values())


class RemoteFolder:
    """The folder of a run's checkpoints in a store. Methods make one attempt, and raise as those of a `Store` do.

    Args:
        url: `s3://BUCKET/PATH`, `gs://`, `azure://`, `sftp://`.

    Raises:
        UserError: it is no URL of such a store, or credentials are missing.
    """

    def __init__(self, url: str) -> None:
        scheme, _, place = url.partition("://")
        self.url = f"{scheme}://{place.rstrip('/')}"
        self.shown = without_password(self.url)
        """The URL for messages."""
        self.store, _, self.path = open_store(f"{self.url}/")

    def __str__(self) -> str:
        return self.shown

    def try_out(self) -> None:
        """Writes a few bytes, reads and removes them."""
        path, content = f"{self.path}.trial-{uuid.uuid4().hex[:8]}", b"llmtrain tries whether it can write here\n"
        self.store.put(path, content)
        found = self.read(self.store.stat(path), len(content))
        self.store.remove(path)
        if found != content:
            raise PermissionError("it gives back something else than what was written")

    def checkpoints(self) -> list[RemoteCheckpoint]:
        """Whatever has the name of a checkpoint, complete or not, the newest first."""
        found: dict[str, dict[str, StoredFile]] = {}
        try:
            for file in self.store.files(self.path):
                name, _, rest = file.path.removeprefix(self.path).partition("/")
                if rest and step_and_epoch(name) is not None:
                    found.setdefault(name, {})[rest] = file
        except FileNotFoundError:  # a folder that nobody has made yet
            return []
        made = [_checkpoint(name, files) for name, files in found.items()]
        return sorted(made, key=lambda one: (one.step, one.epoch), reverse=True)

    def checkpoint(self, name: str) -> RemoteCheckpoint:
        """What lies under one name, which may be nothing."""
        prefix = f"{self.path}{name}/"
        try:
            files = {file.path.removeprefix(prefix): file for file in self.store.files(prefix)}
        except FileNotFoundError:
            files = {}
        return _checkpoint(name, files)

    def read(self, file: StoredFile, largest: int) -> bytes:
        """All of a small file.

        Raises:
            ValueError: it has more bytes than `largest`.
        """
        if file.size > largest:
            raise ValueError(f"{file.path} has {file.size:,} bytes, and no more than {largest:,} are expected")
        data = b""
        while len(data) < file.size:
            data += self.store.read(file, len(data), file.size - len(data))
        return data

    def best(self) -> Best | None:
        """The record of the best checkpoint; None when there is none that can be read."""
        try:
            return Best.model_validate(json.loads(self.read(self.store.stat(self.path + RECORD), 1 << 16)))
        except (FileNotFoundError, ValueError, Changed):  # pydantic's errors are ValueErrors
            return None

    def put(self, name: str, content: bytes | Path, sent: Callable[[int], None] | None = None) -> None:
        """Writes a file; `sent` is told bytes on their way, where the store's client tells them."""
        self.store.put(self.path + name, content, sent)

    def remove(self, checkpoint: RemoteCheckpoint) -> None:
        """Deletes a checkpoint: first it is marked, then its manifest goes, and then the rest."""
        self.put(f"{checkpoint.name}/{UNFINISHED}", b"")
        ordered = sorted(checkpoint.files, key=lambda name: (name != manifest.MANIFEST, name))
        for name in (*(name for name in ordered if name != UNFINISHED), UNFINISHED):
            self.store.remove(f"{self.path}{checkpoint.name}/{name}")
        self.store.prune(f"{self.path}{checkpoint.name}", leftovers=True)


def _checkpoint(name: str, files: dict[str, StoredFile]) -> RemoteCheckpoint:
    step, epoch = step_and_epoch(name) or (-1, -1)
    return RemoteCheckpoint(name, step, epoch, files)


def at_the_start(action: Callable[[], Result], where: str, *, patience: float = PATIENCE) -> Result:
    """Carries something out before a run starts; a store that does not answer is asked again for a while.

    Args:
        action: raises as the methods of a `Store` do.
        where: the folder, for messages.
        patience: seconds in which attempts begin.

    Raises:
        Unreachable: it does not answer.
        UserError: waiting would not help: no such bucket, no right to write, wrong credentials.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except FileNotFoundError as problem:
            raise UserError(f"{where}: there is no such bucket or folder ({reason(problem)})") from problem
        except PermissionError as problem:
            raise UserError(f"{where}: {reason(problem)}") from problem
        except (OSError, EOFError, Changed) as problem:
            if time.monotonic() - began + pause > patience:
                raise Unreachable(reason(problem)) from problem
        time.sleep(pause)
        pause = min(pause * 2, 8.0)
