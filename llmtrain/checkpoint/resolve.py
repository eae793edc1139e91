"""Which checkpoint is meant: the newest complete one, found by looking, never by trusting the ``latest`` link."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import BEST, follow_best
from llmtrain.errors import UserError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_NAME = re.compile(r"^ep(\d+)-ba(\d+)$")


def step_and_epoch(name: str) -> tuple[int, int] | None:
    """Finished steps and epochs of a checkpoint's name, `epE-baB`; None for another kind of name."""
    match = _NAME.match(name)
    return (int(match[2]), int(match[1])) if match else None


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint folder as it lies on disk; its files are not verified yet."""

    path: Path
    step: int
    """Finished optimizer steps: from the manifest, or from the folder's name when the manifest is unusable."""
    epoch: int
    """Finished epochs, from the folder's name; -1 for another kind of name."""
    manifest: manifest.Manifest | None
    problem: str | None
    """Why the manifest is unusable; None when it is fine."""


def checkpoints_in(folder: Path) -> list[CheckpointInfo]:
    """List the checkpoints of a ``checkpoints/`` folder, the newest (by step) first, complete or not.

    Links (``latest``) and hidden folders (``.saving-...``: a save that was cut off) are no checkpoints.
    """
    found = []
    if not folder.is_dir():
        return []
    for entry in folder.iterdir():
        name = _NAME.match(entry.name)
        if entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir():
            continue
        if name is None and not (entry / manifest.MANIFEST).is_file():
            continue
        epoch = int(name[1]) if name else -1
        try:
            content = manifest.read(entry)
            found.append(CheckpointInfo(entry, content.step, epoch, content, None))
        except manifest.ManifestError as error:
            found.append(CheckpointInfo(entry, int(name[2]) if name else -1, epoch, None, str(error)))
    # The last step of an epoch may have been saved before the epoch was counted, and after.
    return sorted(found, key=lambda info: (info.step, info.epoch, info.path.name), reverse=True)


def newest_complete(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint whose every file has the size and the hash that its manifest gives.

    Args:
        folder: A ``checkpoints/`` folder.
        say: Receives one line for each newer checkpoint that was refused, with the reason.

    Returns:
        The checkpoint's folder, or None. None with ``checkpoints_in(folder)`` not empty means that all are damaged:
        a trainer must not start from scratch then.
    """
    newest, _ = first_intact(checkpoints_in(folder), manifest.verify, say)
    return newest.path if newest is not None else None


def first_intact(
    candidates: Iterable[CheckpointInfo], verify: Callable[[Path], list[str]], say: Callable[[str], None]
) -> tuple[CheckpointInfo | None, list[str]]:
    """The first checkpoint that `verify` finds no problem with, and the names of those refused before it.

    Args:
        candidates: Checkpoints, the preferred ones first.
        verify: A checkpoint's problems, one line each.
        say: Receives one line for each that was refused, with the reason.
    """
    return first_usable(candidates, lambda info: verify(info.path), say)


def first_usable(
    candidates: Iterable[CheckpointInfo], problems_of: Callable[[CheckpointInfo], list[str]], say: Callable[[str], None]
) -> tuple[CheckpointInfo | None, list[str]]:
    """`first_intact` where a candidate is more than its folder: one in a store has to be fetched first."""
    refused: list[str] = []
    for info in candidates:
        problems = [info.problem] if info.problem else problems_of(info)
        if not problems:
            return info, refused
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        say(f"checkpoint {info.path.name} is refused: {problems[0]}{more}")
        refused.append(info.path.name)
    return None, refused


def locate(run_or_checkpoint: Path, say: Callable[[str], None] = log.warning) -> Path:
    """Turn what a user points at into one checkpoint: a folder (sharded or full) or a ``.pt`` file.

    Accepts a run folder, its ``checkpoints/`` folder, one checkpoint's folder, the ``latest`` link (which means the
    newest complete checkpoint beside it, wherever the link points), the ``best`` link (which means what it points to)
    or a ``.pt`` file.

    Raises:
        UserError: nothing is there, or no checkpoint there is complete.
    """
    path = run_or_checkpoint
    if path.name == LATEST and path.is_symlink():
        return locate(path.parent, say)
    if path.name == BEST and path.is_symlink():
        return follow_best(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder. Give a run folder, a checkpoint folder or a .pt file.")
    if is_checkpoint(path):
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest = newest_complete(folder, say)
    if newest is not None:
        return newest
    refused = checkpoints_in(folder)
    if refused:
        names = ", ".join(info.path.name for info in refused)
        raise UserError(f"{folder}: no complete checkpoint: {names} are damaged or were never finished.")
    if _NAME.match(path.name):
        raise UserError(f"{path}: an empty or unfinished checkpoint (neither {manifest.MANIFEST} nor .metadata).")
    raise UserError(f"{path}: holds no checkpoint. Give a run folder, a checkpoint folder or a .pt file.")


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder itself is a checkpoint (ours, or another trainer's sharded one), complete or not."""
    return (folder / manifest.MANIFEST).is_file() or (folder / ".metadata").is_file()


def run_folder(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, or None when it stands alone.

    RUN of RUN/checkpoints/epE-baB, of a file in that folder, and of RUN/checkpoints/NAME.pt (llm-foundry's layout).
    """
    for parent in list(checkpoint.resolve().parents)[:2]:
        if parent.name == CHECKPOINTS:
            return parent.parent
    return None
