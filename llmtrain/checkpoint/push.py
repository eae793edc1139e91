"""An export goes elsewhere: a folder, object storage, or a repository of a hub. What opens it is written last."""

import hashlib
import os
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.exported_files import CONFIGS, of_an_export, refuse_others_files
from llmtrain.checkpoint.staging import refuse_place
from llmtrain.errors import UserError
from llmtrain.prep.stores.open import open_store
from llmtrain.prep.stores.retry import persistently
from llmtrain.prep.stores.store import Store, StoredFile
from llmtrain.progress import progress
from llmtrain.redaction import without_password

_LAST = (
    "llmtrain_export.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "config.json",
)
"""What readers look for first, in the order in which it is written, after all other files."""
TRIALS = 3
"""Attempts of :func:`reach`: a training waits for it."""
_PART = 8 * 1024 * 1024  # boto3's, of uploads in parts


@dataclass(frozen=True)
class Pushed:
    """What is there now."""

    destination: str
    files: int
    size: int
    """Bytes."""
    checked: str
    """How it was looked at afterwards."""

    def __str__(self) -> str:
        return f"Pushed to {self.destination}: {self.files} files, {self.size / 1e6:,.1f} MB, {self.checked}"


def push(folder: Path, destination: str, *, overwrite: bool = True, private: bool = True) -> Pushed:
    """Copy an export to a folder, a URL (``s3://``, ``gs://``, ``azure://``, ``sftp://``) or ``hf://USER/REPOSITORY``.

    What fails is tried again (`LLMTRAIN_STORAGE_ATTEMPTS` times), and what has arrived is compared with what was sent.
    Nobody who looks at the destination meanwhile sees half an export that looks whole.

    Args:
        folder: What `llmtrain export` wrote.
        destination: Where the files go, without a folder of their own in between.
        overwrite: Replace an export that stands there. A repository keeps its history in any case.
        private: Of a repository that does not exist yet: only its owner sees it.

    Raises:
        UserError: it is no export, the destination cannot be used, or what arrived is not what was sent.
    """
    files = files_of(folder)
    if not destination.strip():
        raise UserError("Pushing needs a destination: a folder, s3://BUCKET/PATH, hf://USER/REPOSITORY, ...")
    if destination.startswith("hf://"):
        from llmtrain.checkpoint.push_hub import push_to_hub

        return push_to_hub(folder, files, destination, private=private)
    if "://" in destination:
        return _to_store(folder, files, destination, overwrite=overwrite)
    return _to_folder(folder, files, Path(destination), overwrite=overwrite)


def files_of(folder: Path) -> list[str]:
    """An export's files by their names relative to it, in the order in which they are to be written.

    Raises:
        UserError: it is no export.
    """
    if not any((folder / name).is_file() for name in CONFIGS):
        raise UserError(f"{folder}: is no export (no config.json). Make one: llmtrain export RUN {folder}")
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return sorted(names, key=lambda name: (_LAST.index(name) + 1 if name in _LAST else 0, name))


def _to_folder(folder: Path, files: list[str], target: Path, *, overwrite: bool) -> Pushed:
    if target.resolve() == folder.resolve():
        raise UserError(f"{target}: is the export itself; give another place.")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give a folder.")
    refuse_place(target)
    taken = target.is_dir() and any(target.iterdir())
    if taken:
        refuse_others_files(target, recorded=files)
    size = sum((folder / name).stat().st_size for name in files)
    if taken and _equal(folder, files, target):
        return Pushed(str(target), len(files), size, "which are there already, with the same hashes")
    if taken and not overwrite:
        raise _taken(str(target))
    staging = target.parent / f".{target.name}.pushing-{uuid.uuid4().hex[:8]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with progress(Console(stderr=True), f"copying to {target}", size, "bytes") as advance:
            for name in files:
                copy = staging / "out" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, copy)
                with copy.open("rb+") as file:
                    os.fsync(file.fileno())
                advance(copy.stat().st_size)
                if manifest.file_entry(copy) != manifest.file_entry(folder / name):
                    raise UserError(f"{target}: {name} does not arrive as it was sent; is the disk sound?")
        if taken:
            target.rename(staging / "old")
        elif target.is_dir():
            target.rmdir()
        (staging / "out").rename(target)
    except OSError as error:
        if taken and not target.exists() and (staging / "old").is_dir():
            (staging / "old").rename(target)
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Pushed(str(target), len(files), size, "each file's hash compared")


def _equal(folder: Path, files: list[str], target: Path) -> bool:
    """Whether a folder holds these files, and no others, with the same content."""
    return sorted(files_of(target)) == sorted(files) and all(
        manifest.file_entry(folder / name) == manifest.file_entry(target / name) for name in files
    )


def _to_store(folder: Path, files: list[str], url: str, *, overwrite: bool) -> Pushed:
    scheme, _, place = url.partition("://")
    url = f"{scheme}://{place.strip('/')}"
    store, _, path = open_store(url + "/" if place else url)
    shown = without_password(url)
    there = _listed(store, path, shown)
    sizes = {name: (folder / name).stat().st_size for name in files}
    same = {name for name in files if name in there and same_content(folder / name, there[name])}
    old = [name for name in there if of_an_export(name) and name not in sizes]
    in_the_way = old + [name for name in files if name in there and name not in same]
    if not overwrite and in_the_way:
        if not there.keys() & set(_LAST):
            raise UserError(f"{shown}: holds {', '.join(in_the_way[:4])} already; pass --overwrite to replace them.")
        raise _taken(shown)
    # What opens an export goes first and comes last; then what is left of another one, and would be read with this one.
    for name in [name for name in reversed(_LAST) if name in there and name not in same]:
        _remove(store, path + name, shown)
    for name in [name for name in old if name not in _LAST]:
        _remove(store, path + name, shown)
    sent = set(files) - same
    with progress(Console(stderr=True), f"pushing to {shown}", sum(sizes.values()), "bytes") as advance:
        for name in files:
            if name in sent:
                _put(store, path + name, folder / name, f"writing {shown}/{name}")
            advance(sizes[name])
    problems, hashed = arrived(folder, files, sent, _listed(store, path, shown))
    if problems:
        raise UserError(f"{shown}: did not arrive as it was sent: {'; '.join(problems[:4])}")
    checked = "each file's size and hash compared" if hashed else "each file's size compared (not all MD5s are known)"
    return Pushed(shown, len(files), sum(sizes.values()), checked)


def _taken(where: str) -> UserError:
    return UserError(f"{where}: there is an export already; pass --overwrite to replace it, or give another place.")


def _put(store: Store, path: str, file: Path, doing: str) -> None:
    try:
        persistently(lambda: store.put(path, file), doing)
    except FileNotFoundError as problem:
        raise UserError(f"{doing}: there is no such bucket or folder ({problem})") from None


def _remove(store: Store, path: str, shown: str) -> None:
    persistently(lambda: store.remove(path), f"removing an old file of {shown}")


def _listed(store: Store, path: str, shown: str) -> dict[str, StoredFile]:
    """Files below a place, by their names relative to it."""
    try:
        found = persistently(lambda: list(store.files(path)), f"listing {shown}")
    except FileNotFoundError:
        return {}
    return {file.path.removeprefix(path): file for file in found}


def arrived(folder: Path, files: list[str], sent: set[str], there: dict[str, StoredFile]) -> tuple[list[str], bool]:
    """What is missing or differs, and whether hashes could be compared.

    What looks like an MD5 is none where a bucket encrypts with keys of its own: then it fits no file that was sent.
    """
    problems, same, other = [], [], []
    for name in files:
        size = (folder / name).stat().st_size
        if name not in there:
            problems.append(f"{name} is not there")
        elif there[name].size != size:
            problems.append(f"{name} has {there[name].size:,} bytes instead of {size:,}")
        elif same_content(folder / name, there[name]):
            same.append(name)
        else:
            other.append(name)
    if any(name in sent for name in same):
        problems += [f"{name} has another hash" for name in other if _is_md5(there[name])]
    return problems, not other


def _is_md5(stored: StoredFile) -> bool:
    """Whether a file's version looks like the MD5 of its content."""
    return len(stored.version.strip('"')) == 32


def same_content(file: Path, stored: StoredFile) -> bool:
    """Whether a stored file is known to be this one: S3's ETag is the MD5, or that of the parts' MD5s."""
    tag = stored.version.strip('"')
    digest, _, parts = tag.partition("-")
    if stored.size != file.stat().st_size or len(digest) != 32:
        return False
    with file.open("rb") as stream:
        if not parts:
            return hashlib.file_digest(stream, "md5").hexdigest() == digest
        each = [hashlib.md5(part).digest() for part in iter(lambda: stream.read(_PART), b"")]
    return f"{hashlib.md5(b''.join(each)).hexdigest()}-{len(each)}" == tag


def reach(destination: str) -> str:
    """Try whether a destination can be written, by writing and removing a few bytes; a hub is asked who we are.

    Returns:
        What was found, in a line.

    Raises:
        UserError: it cannot.
    """
    if destination.startswith("hf://"):
        from llmtrain.checkpoint.push_hub import reach_hub

        return reach_hub(destination)
    name = f".trial-{uuid.uuid4().hex[:8]}"
    if "://" not in destination:
        place = Path(destination)
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(b"x")
            (place / name).unlink()
        except OSError as error:
            raise UserError(f"{destination}: cannot be written: {error.strerror or error}") from None
        return f"{destination}: can be written"
    shown = without_password(destination)
    store, _, path = open_store(destination.rstrip("/") + "/")
    try:
        persistently(lambda: store.put(path + name, b"x"), f"writing to {shown}", most=TRIALS)
        persistently(lambda: store.remove(path + name), f"removing from {shown}", most=TRIALS)
    except FileNotFoundError as problem:
        raise UserError(f"{shown}: there is no such bucket or folder ({problem})") from None
    return f"{shown}: can be written"


def push_command(folder: Path, destination: str, *, overwrite: bool, private: bool) -> None:
    """``llmtrain push``."""
    print(push(folder, destination, overwrite=overwrite, private=private))
    sys.stdout.flush()
