"""One checkpoint comes from a store: under a hidden name, each file compared with the manifest, then renamed."""

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.remote import LARGEST_MANIFEST, RemoteCheckpoint, RemoteFolder, Unreachable
from llmtrain.errors import UserError
from llmtrain.file_lock import one_at_a_time
from llmtrain.prep.stores.remote_file import RemoteFile
from llmtrain.prep.stores.retry import persistently
from llmtrain.prep.stores.store import Changed, StoredFile

STAGING = ".downloading-"
LOCK = ".downloading.lock"
_BLOCK = 1 << 22  # bytes
_AT_ONCE = 4  # files


def download(
    remote: RemoteFolder, there: RemoteCheckpoint, folder: Path, got: Callable[[int], None] = lambda n: None
) -> list[str]:
    """Fetches a checkpoint to `folder/NAME`; what a killed process has fetched of it is not fetched again.

    Nothing is at `folder/NAME` before all of it is there; a damaged checkpoint of that name is replaced. Of several
    processes that fetch to one folder (jobs that start from the same weights) one does, and the others wait for it.

    Args:
        remote: where from.
        there: the checkpoint.
        folder: `checkpoints/` of the run on this machine.
        got: told how many bytes have come since the last call.

    Returns:
        What is wrong with the checkpoint in the store, a line each; [] when it is on this machine now.

    Raises:
        Unreachable: the store fails again and again.
        UserError: this machine's disk is full, or cannot be written.
    """
    name = there.name

    def waits() -> None:
        print(f"fetching    {folder}: waits for another process that fetches to it", file=sys.stderr, flush=True)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / LOCK, waits, stays=False):
            return _download(remote, there, folder, got)
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise UserError(f"{folder / name} cannot be written ({free / 1e9:.2f} GB free): {error}") from error


def _download(remote: RemoteFolder, there: RemoteCheckpoint, folder: Path, got: Callable[[int], None]) -> list[str]:
    name = there.name
    staging = folder / f"{STAGING}{name}"
    for left in folder.glob(f"{STAGING}*"):
        if left != staging:
            shutil.rmtree(left, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    content, problems = _manifest(remote, there, staging)
    if content is None or problems:
        shutil.rmtree(staging, ignore_errors=True)
        return problems
    if _is_here(folder / name, staging):
        shutil.rmtree(staging, ignore_errors=True)
        return []
    # What lies in the staging folder already is counted as well: it is replaced where it is not right.
    need, free = sum(entry.size for entry in content.files.values()), shutil.disk_usage(folder).free
    if need > free + sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()):
        raise UserError(f"{folder}: {name} of {remote} needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")

    def fetch(file: str) -> str | None:
        return _file(remote, there.files[file], staging / file, content.files[file], f"{name}/{file}", got)

    with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
        problems = [problem for problem in pool.map(fetch, content.files) if problem is not None]
    if problems:
        shutil.rmtree(staging, ignore_errors=True)
        return problems
    _rename(staging, folder / name)
    return []


def _manifest(
    remote: RemoteFolder, there: RemoteCheckpoint, staging: Path
) -> tuple[manifest.Manifest | None, list[str]]:
    """Puts the manifest into the staging folder and looks at it before anything that it says is used."""
    stored = there.files.get(manifest.MANIFEST)
    if stored is None:
        return None, [f"{there.name}: no {manifest.MANIFEST}; it was never finished, or is another trainer's"]
    try:
        body = persistently(
            lambda: remote.read(stored, LARGEST_MANIFEST), f"reading {remote}/{there.name}/{manifest.MANIFEST}"
        )
    except (FileNotFoundError, Changed, ValueError) as error:
        return None, [f"{there.name}/{manifest.MANIFEST}: {error or 'changed while it was being read'}"]
    except UserError as error:
        raise Unreachable(str(error)) from error
    with (staging / manifest.MANIFEST).open("wb") as out:
        out.write(body)
        out.flush()
        os.fsync(out.fileno())
    try:
        content = manifest.read(staging)
    except manifest.ManifestError as error:
        # The staging folder is nothing that the user knows.
        return None, [str(error).replace(str(staging), f"{remote}/{there.name}")]
    if not content.files or (content.kind == "sharded" and ".metadata" not in content.files):
        return None, [f"{there.name}/{manifest.MANIFEST}: lists no files"]
    problems = []
    for file, entry in content.files.items():
        if str(PurePosixPath(file)) != file or "\0" in file or PurePosixPath(file).parts[0] == manifest.MANIFEST:
            return None, [f"{there.name}/{manifest.MANIFEST}: `{file!r}` is no name of a file inside the checkpoint"]
        if file not in there.files:
            problems.append(f"{there.name}/{file}: missing")
        elif there.files[file].size != entry.size:
            problems.append(f"{there.name}/{file}: {there.files[file].size:,} bytes instead of {entry.size:,}")
    return content, problems


def _file(
    remote: RemoteFolder,
    stored: StoredFile,
    target: Path,
    entry: manifest.FileEntry,
    name: str,
    got: Callable[[int], None],
) -> str | None:
    """Fetches a file; what is wrong with it. What was damaged on the way is fetched a second time."""
    if target.is_file() and manifest.file_entry(target) == entry:
        got(entry.size)
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    found = ""
    for again in (False, True):
        digest = xxhash.xxh3_128()
        try:
            with RemoteFile(remote.store, stored, f"{remote}/{name}") as source, target.open("wb") as file:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
                    if not again:
                        got(len(block))
                file.flush()
                os.fsync(file.fileno())
        except UserError as error:
            if isinstance(error.__cause__, (Changed, FileNotFoundError)):
                return f"{name}: was changed or deleted while it was being read"
            raise Unreachable(str(error)) from error
        found = digest.hexdigest()
        if found == entry.xxh128:
            return None
    return f"{name}: hash differs (xxh128 {found[:12]}... instead of {entry.xxh128[:12]}...)"


def _is_here(checkpoint: Path, staging: Path) -> bool:
    """Whether the very checkpoint whose manifest was just fetched is on this machine, and sound."""
    here, there = checkpoint / manifest.MANIFEST, staging / manifest.MANIFEST
    return here.is_file() and here.read_bytes() == there.read_bytes() and not manifest.verify(checkpoint)


def _rename(staging: Path, target: Path) -> None:
    old = staging.with_name(f"{STAGING}replaced")
    if target.exists():  # found damaged
        target.rename(old)
    manifest.sync_folder(staging)
    staging.rename(target)
    manifest.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
