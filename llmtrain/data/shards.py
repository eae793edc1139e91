"""A folder of MDS shards, looked at before anything is read from it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import UserError
from llmtrain.inside import why_outside
from llmtrain.json_text import parse_json

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
        if why := why_outside(name):
            shown = name if len(name) < 200 else f"{name[:200]}..."
            raise UserError(
                f"{where}: the index names the shard {shown!r}, outside of its folder ({why}); do not use this data"
            )


def check_size(name: str, samples: int, raw_bytes: int, where: str) -> None:
    """Refuse an index that promises more rows than a shard of that size can have: arrays are made for all of them.

    Raises:
        UserError: A shard begins with four bytes for each row, and its offsets have 32 bits.
    """
    whole = type(samples) is int and type(raw_bytes) is int
    if not whole or not 0 <= raw_bytes < 2**32 or not 0 <= samples <= raw_bytes // 4:
        raise UserError(
            f"{where}: the index says that the shard {name!r} has {samples} rows in {raw_bytes} bytes, which no shard "
            "can have; do not use this data"
        )


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
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
