"""A folder of MDS shards, looked at before anything is read from it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llmtrain.errors import UserError

INDEX = "index.json"
MANIFEST = "prep.json"
"""What `llmtrain prep` writes last; a folder that has none may be somebody else's."""


def require_index(folder: Path, key: str) -> None:
    """Check that a folder on this machine holds shards.

    Args:
        folder: Where the index should be.
        key: Of the recipe, for the message.

    Raises:
        UserError: It does not.
    """
    if (folder / INDEX).is_file():
        return
    if not folder.is_dir():
        raise UserError(
            f"{key}: there is no folder {folder}. Prepare the data first: llmtrain prep data_prep/NAME.yaml"
        )
    below = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    hint = f"It has shards below: {', '.join(below)} (set split, or a longer path)" if below else "Run llmtrain prep"
    raise UserError(f"{key}: {folder} has no {INDEX}, so it holds no (complete) shards. {hint}")


def prepared_with(folder: Path) -> dict[str, Any] | None:
    """What `llmtrain prep` recorded about shards (tokenizer, row length), or None for shards of another origin.

    It stands in the index itself, so that it travels with the shards; or in `prep.json` beside them or above.
    """
    index = _json(folder / INDEX).get("llmtrain")
    if isinstance(index, dict):
        return index
    for place in (folder, folder.parent, folder.parent.parent):
        found = _json(place / MANIFEST)
        if "tokenizer_fingerprint" in found:
            return found
    return None


def check_names(basenames: Sequence[str], where: str) -> None:
    """Refuse an index whose shards lie outside of its folder: it could delete or overwrite any file.

    Raises:
        UserError: A name is absolute or climbs up.
    """
    for name in basenames:
        posix, windows = PurePosixPath(name), PureWindowsPath(name)
        if not name or posix.is_absolute() or windows.drive or windows.root or ".." in {*posix.parts, *windows.parts}:
            raise UserError(f"{where}: the index names the shard {name!r}, outside of its folder; do not use this data")


def check_columns(names: Sequence[str], encodings: Sequence[str], max_seq_len: int, where: str) -> None:
    """Check that shards hold rows of at least `max_seq_len` token ids, as far as their index tells.

    Raises:
        UserError: There is no column `tokens`, or it is no integer array or bytes, or its rows are too short.
    """
    if "tokens" not in names:
        hint = (
            "It holds raw text: tokenize it with llmtrain prep"
            if "text" in names
            else f"Its columns are {', '.join(names) or 'none'}"
        )
        raise UserError(f"{where}: no column 'tokens'. {hint}")
    encoding = encodings[names.index("tokens")]
    kind, _, detail = encoding.partition(":")
    dtype, _, shape = detail.partition(":")
    if encoding != "bytes" and (kind != "ndarray" or not re.fullmatch(r"(u?int(8|16|32|64))?", dtype)):
        raise UserError(f"{where}: column 'tokens' is {encoding}; expected an integer ndarray or bytes")
    if not shape:
        return
    if "," in shape:
        raise UserError(f"{where}: column 'tokens' has rows of shape ({shape}); expected one dimension")
    if int(shape) < max_seq_len:
        raise UserError(
            f"{where}: its rows have {shape} tokens, fewer than max_seq_len {max_seq_len}. "
            f"Set max_seq_len: {shape}, or prepare the data again with longer rows"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
