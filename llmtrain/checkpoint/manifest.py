"""manifest.json: what makes a folder of files a complete checkpoint.

Neither torch's distributed checkpoints nor Composer's have a checksum: four flipped bytes load without an error
(see docs/checkpoints.md). The manifest lists every file with its size and its xxh128, and is written last,
so a folder without one was never finished. xxh128 finds damage; it is no signature and does not stop an attacker,
which is why reading a checkpoint never unpickles freely either (:mod:`llmtrain.checkpoint.unpickle`).
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain.checkpoint.code_version import code_version
from llmtrain.errors import UserError
from llmtrain.inside import why_outside
from llmtrain.json_text import parse_json
from llmtrain.redaction import redact

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 8 * 1024 * 1024


class FileEntry(BaseModel):
    """Size in bytes and xxh128 (hexadecimal) of one file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    size: int
    xxh128: str


class Manifest(BaseModel):
    """The content of manifest.json.

    Keys that a later version adds are ignored here; a change of meaning raises ``format`` instead.
    """

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    kind: Literal["sharded", "full"]
    """``sharded``: torch.distributed.checkpoint files; ``full``: one torch.save file."""
    step: int
    """Finished optimizer steps."""
    tokens: int
    """Training tokens seen so far, over all ranks."""
    files: dict[str, FileEntry]
    """Every file of the checkpoint but the manifest, by its name relative to the folder."""
    recipe: dict[str, Any]
    """The resolved recipe that the run had."""
    tokenizer_fingerprint: str | None = None
    attention: dict[str, str] = {}
    """`kernel`: what computed attention in training; `reason`: why that one."""
    weights_only: bool = False
    """Optimizer, random state and data position were left out: weights to start from, not a run to continue."""
    versions: dict[str, str] = {}
    code: dict[str, str] = {}
    """What wrote it: `files`, a hash of the package's Python files; `commit`, where that is a checkout of git."""


class ManifestError(UserError):
    """manifest.json is missing, damaged, or of a newer format."""


def file_entry(path: Path) -> FileEntry:
    """Hash a file in blocks of 8 MiB (constant memory)."""
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(size=size, xxh128=digest.hexdigest())


def write(
    folder: Path,
    *,
    kind: Literal["sharded", "full"],
    step: int,
    tokens: int,
    files: Mapping[str, FileEntry],
    recipe: Mapping[str, Any],
    tokenizer_fingerprint: str | None,
    attention: Mapping[str, str] | None = None,
    weights_only: bool = False,
) -> None:
    """Declare a checkpoint complete: write its manifest under a temporary name, sync it to disk and rename it.

    Args:
        folder: The checkpoint's folder; every file of the checkpoint is already there.
        kind: ``sharded`` or ``full``.
        step: Finished optimizer steps.
        tokens: Training tokens seen so far, over all ranks.
        files: Name relative to ``folder`` -> its :func:`file_entry` (each rank may hash its own files).
        recipe: The resolved recipe; must be JSON. Its secrets are masked.
        tokenizer_fingerprint: Of the run's tokenizer, or None.
        attention: The kernel that computed it, and why.
        weights_only: The checkpoint holds weights and nothing to continue from.
    """
    for name in files:
        _check_name(folder, name)
    body = Manifest(
        kind=kind,
        step=step,
        tokens=tokens,
        files=dict(sorted(files.items())),
        recipe=redact(dict(recipe)),
        tokenizer_fingerprint=tokenizer_fingerprint,
        attention=dict(attention or {}),
        weights_only=weights_only,
        versions=_versions(),
        code=code_version(),
    ).model_dump(mode="json")
    # Through text and back, so that the checksum is of what a reader will see (keys are strings, tuples are lists).
    body = json.loads(json.dumps(body))
    body["checksum"] = _checksum(body)
    temporary = folder / f".{MANIFEST}.writing"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST)
    sync_folder(folder)


def read(folder: Path) -> Manifest:
    """Read and check manifest.json itself (its own checksum too), not the files that it lists.

    Raises:
        ManifestError: it is missing, is no JSON, was changed, or has a format newer than this version knows.
    """
    path = folder / MANIFEST
    try:
        body = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{folder}: no {MANIFEST}; the checkpoint was never finished.") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("format"), int):
        raise ManifestError(f"{path}: not a manifest of llmtrain (no `format`).")
    if body["format"] > FORMAT:
        raise ManifestError(
            f"{path}: format {body['format']} is newer than this version of llmtrain reads ({FORMAT}); "
            "update llmtrain to use this checkpoint."
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise ManifestError(f"{path}: its checksum differs: the file was damaged or edited after it was written.")
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for name in manifest.files:
        _check_name(folder, name)
    return manifest


def verify(folder: Path) -> list[str]:
    """Compare a checkpoint with its manifest; the problems, one line each, empty when it is intact.

    Sizes come first, because they cost nothing; only when all of them are right does every file get hashed.
    """
    if problems := verify_sizes(folder):
        return problems
    return [p for name, entry in read(folder).files.items() if (p := _hash_problem(folder, name, entry))]


def verify_sizes(folder: Path) -> list[str]:
    """The part of `verify` that reads no file: is the manifest sound, is each file there with its size?"""
    try:
        manifest = read(folder)
    except ManifestError as error:
        return [str(error)]
    if not manifest.files or (manifest.kind == "sharded" and ".metadata" not in manifest.files):
        return [f"{folder.name}/{MANIFEST}: lists no {'.metadata' if manifest.kind == 'sharded' else 'files'}"]
    return [p for name, entry in manifest.files.items() if (p := _size_problem(folder, name, entry))]


def verify_file(folder: Path, name: str) -> str | None:
    """Compare one file of a checkpoint with the manifest; the problem in one line, or None.

    Raises:
        ManifestError: the manifest itself cannot be used.
    """
    entry = read(folder).files.get(name)
    if entry is None:
        return f"{folder.name}/{name}: not listed in {MANIFEST}; it does not belong to this checkpoint"
    return _size_problem(folder, name, entry) or _hash_problem(folder, name, entry)


def _size_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{folder.name}/{name}: missing"
    except OSError as error:
        return f"{folder.name}/{name}: {error.strerror}"
    if size != entry.size:
        return f"{folder.name}/{name}: {size:,} bytes instead of {entry.size:,}"
    return None


def _hash_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    try:
        found = file_entry(folder / name)
    except OSError as error:
        return f"{folder.name}/{name}: {error.strerror}"
    if found != entry:
        return f"{folder.name}/{name}: hash differs (xxh128 {found.xxh128[:12]}... instead of {entry.xxh128[:12]}...)"
    return None


def _check_name(folder: Path, name: str) -> None:
    if why_outside(name) or name == MANIFEST:
        raise ManifestError(f"{folder / MANIFEST}: `{name}` is no name of a file inside the checkpoint.")


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("llmtrain", "torch", "mosaicml", "mosaicml-streaming", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable; that some network file systems refuse to open folders is no failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
