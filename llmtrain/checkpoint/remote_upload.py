"""One checkpoint goes to a store: the manifest last, after what has arrived was compared with what was sent."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import RECORD, Best, read_best
from llmtrain.checkpoint.push import arrived, same_content
from llmtrain.checkpoint.remote import LARGEST_MANIFEST, LATEST_RECORD, UNFINISHED, RemoteCheckpoint, RemoteFolder


class Damaged(Exception):
    """The checkpoint on this machine is not (any more) what its manifest says: it is not worth sending."""


def is_there(remote: RemoteFolder, there: RemoteCheckpoint, folder: Path) -> bool:
    """Whether a checkpoint of this machine has arrived before: the same manifest, and the files that it lists.

    Raises:
        OSError: as the methods of a `Store` do.
    """
    stored = there.files.get(manifest.MANIFEST)
    try:
        if stored is None or remote.read(stored, LARGEST_MANIFEST) != (folder / manifest.MANIFEST).read_bytes():
            return False
        entries = manifest.read(folder).files
    except (ValueError, manifest.ManifestError):
        return False
    return all(name in there.files and there.files[name].size == entry.size for name, entry in entries.items())


def upload(remote: RemoteFolder, folder: Path, sent: Callable[[str, int], None], known: dict[str, str]) -> str:
    """Sends a checkpoint; one attempt, which goes on where the one before it broke.

    What stands there under its name is not complete from the first byte on, and complete with the last one.

    Args:
        remote: where to.
        folder: the checkpoint; its name is kept.
        sent: told, by file, how many of its bytes have arrived or are on their way.
        known: file -> version in the store, of what an attempt before has sent; is filled in.

    Returns:
        How what has arrived was compared.

    Raises:
        Damaged: a file is not what the manifest says, or is gone.
        OSError: as the methods of a `Store` do.
    """
    name = folder.name
    try:
        content, body = manifest.read(folder), (folder / manifest.MANIFEST).read_bytes()
    except (manifest.ManifestError, FileNotFoundError) as error:
        raise Damaged(str(error)) from None
    there = remote.checkpoint(name)
    remote.put(f"{name}/{UNFINISHED}", b"")
    if there.has_manifest:  # of an earlier run, or damaged
        remote.store.remove(f"{remote.path}{name}/{manifest.MANIFEST}")
    for file in sorted(content.files):
        if problem := manifest.verify_file(folder, file):
            raise Damaged(problem)
        stored = there.files.get(file)
        size = content.files[file].size
        before = stored is not None and stored.size == size and stored.version == known.get(file)
        if not before and not (stored is not None and same_content(folder / file, stored)):
            remote.put(f"{name}/{file}", folder / file, _in_all(file, sent))
            known[file] = remote.store.stat(f"{remote.path}{name}/{file}").version
        sent(file, size)
    there = remote.checkpoint(name)
    problems, hashed = arrived(folder, sorted(content.files), set(content.files), dict(there.files))
    if problems:
        known.clear()
        raise ConnectionError(f"{name} did not arrive as it was sent: {'; '.join(problems[:4])}")
    if (folder / manifest.MANIFEST).read_bytes() != body:
        known.clear()
        raise ConnectionError(f"{name} was written anew while it was being sent")
    remote.put(f"{name}/{manifest.MANIFEST}", body)
    stored = remote.store.stat(f"{remote.path}{name}/{manifest.MANIFEST}")
    if remote.read(stored, len(body)) != body:
        raise ConnectionError(f"the manifest of {name} did not arrive as it was sent")
    for old in there.files.keys() - content.files.keys() - {manifest.MANIFEST}:  # the marker, and leftovers
        remote.store.remove(f"{remote.path}{name}/{old}")
    return "sizes and hashes compared" if hashed else "sizes compared"


def _in_all(file: str, sent: Callable[[str, int], None]) -> Callable[[int], None]:
    done, lock = 0, threading.Lock()

    def more(n: int) -> None:  # several threads send parts of a large file
        nonlocal done
        with lock:
            done += n
            sent(file, done)

    return more


def tell_latest(remote: RemoteFolder, folder: Path) -> None:
    """Writes `latest.json`, for people, about a checkpoint that has arrived."""
    content = manifest.read(folder)
    told = {"checkpoint": folder.name, "step": content.step, "tokens": content.tokens}
    remote.put(LATEST_RECORD, (json.dumps(told, indent=1) + "\n").encode())


def tell_best(remote: RemoteFolder, checkpoints: Path, complete: set[str]) -> Best | None:
    """Has the store know the best checkpoint once that has arrived; the one that the store names in the end."""
    ours, theirs = read_best(checkpoints), remote.best()
    if ours is not None and ours.checkpoint in complete and ours != theirs:
        remote.put(RECORD, (json.dumps(ours.model_dump(), indent=1) + "\n").encode())
        return ours
    return theirs
