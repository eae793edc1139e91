"""Composer's hook that checks a checkpoint file before anything in it is unpickled.

Composer calls the function that the environment variable ``CHECKPOINT_VALIDATION_FUNCTION`` names for ``.metadata``,
for every ``.distcp`` that a rank reads, and for full checkpoints, before a byte of the file is used. In training that
is :func:`require`, whose UserError reaches the user as it is; :func:`validate` keeps to the hook's contract, a bool.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.checkpoint import manifest
from llmtrain.errors import UserError

log = logging.getLogger(__name__)

# One entry a file: Composer asks for the same file again and again, and hashing 50 GB once is enough. The inode and the
# time of change are part of the key, so a file that is replaced is hashed again.
_verdicts: dict[tuple[str, int, int, int], str | None] = {}
_warned: set[Path] = set()
_told: set[str] = set()


def validate(path: str | os.PathLike[str], specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """Whether a checkpoint file is what its manifest says.

    Args:
        path: A file of a checkpoint folder, or a symbolic link to one.
        specs: (offset, length) of the parts that will be read. Unused: the hash covers the whole file.

    Returns:
        False when the size or the hash differs, the file is not listed, or the manifest itself is damaged (the reason
        is logged). True for a checkpoint without a manifest (another trainer's), with one warning a folder.
    """
    problem = _problem(Path(path))
    if problem is not None and problem not in _told:
        _told.add(problem)
        log.error("Checkpoint refused: %s", problem)
    return problem is None


def require(path: str | os.PathLike[str], specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """What :func:`validate` says, as True or an error.

    Raises:
        UserError: what :func:`validate` would have logged.
    """
    problem = _problem(Path(path))
    if problem is not None:
        raise UserError(f"Checkpoint refused: {problem}")
    return True


def _problem(path: Path) -> str | None:
    names = list(_names(path))
    file = next((name for name in names if (name.parent / manifest.MANIFEST).is_file()), None)
    if file is None:
        folder = names[-1].parent
        if folder not in _warned:
            _warned.add(folder)
            log.warning("%s has no %s: its files are loaded unverified.", folder, manifest.MANIFEST)
        return None
    try:
        stat = file.stat()
    except OSError as error:
        return f"{file}: {error.strerror}"
    key = (str(file.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _verdicts:
        try:
            _verdicts[key] = manifest.verify_file(file.parent, file.name)
        except manifest.ManifestError as error:
            _verdicts[key] = str(error)
    return _verdicts[key]


def _names(path: Path) -> Iterator[Path]:
    """The file as it was named and, link by link, what it points to.

    For a full checkpoint Composer makes a link in a temporary folder; the manifest lies beside its target. That may be
    a link again, into a store of files by their hash, so not always the last file of the chain has the manifest.
    """
    for _ in range(40):  # as many as Linux follows
        yield path
        if not path.is_symlink():
            return
        path = path.parent / path.readlink()
