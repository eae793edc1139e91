"""Composer's hook that checks a checkpoint file before anything in it is unpickled.

Composer calls the function that the environment variable ``CHECKPOINT_VALIDATION_FUNCTION`` names
(``llmtrain.checkpoint.validation.validate``) for ``.metadata``, for every ``.distcp`` that a rank reads, and for full
checkpoints; when it answers False, the load fails with a ValueError before a byte of the file is used.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from llmtrain.checkpoint import manifest

log = logging.getLogger(__name__)

# One entry a file: Composer asks for the same file again and again, and hashing 50 GB once is enough. The inode and the
# time of change are part of the key, so a file that is replaced is hashed again.
_verdicts: dict[tuple[str, int, int, int], bool] = {}
_warned: set[Path] = set()


def validate(path: str | os.PathLike[str], specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """Whether a checkpoint file is what its manifest says.

    Args:
        path: A file of a checkpoint folder.
        specs: (offset, length) of the parts that will be read. Unused: the hash covers the whole file.

    Returns:
        False when the size or the hash differs, the file is not listed, or the manifest itself is damaged (the reason
        is logged). True for a checkpoint without a manifest (another trainer's), with one warning a folder.
    """
    file = Path(path)
    folder = file.parent
    if not (folder / manifest.MANIFEST).is_file():
        if folder not in _warned:
            _warned.add(folder)
            log.warning("%s has no %s: its files are loaded unverified.", folder, manifest.MANIFEST)
        return True
    try:
        stat = file.stat()
    except OSError as error:
        log.error("Checkpoint refused: %s: %s", file, error.strerror)
        return False
    key = (str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _verdicts:
        try:
            problem = manifest.verify_file(folder, file.name)
        except manifest.ManifestError as error:
            problem = str(error)
        if problem:
            log.error("Checkpoint refused: %s", problem)
        _verdicts[key] = problem is None
    return _verdicts[key]
