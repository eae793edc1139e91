"""Which files an export consists of, and which files in its place are somebody else's."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from llmtrain.checkpoint.fetch import TOKENIZER_FILES
from llmtrain.errors import UserError

RECORD = "llmtrain_export.json"
"""Beside the weights: which checkpoint they are, and how that was proven."""
CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json")
"""One of them opens an export."""
_NAMES = (
    *CONFIGS,
    "generation_config.json",
    RECORD,
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "modeling_llmtrain.py",
    *TOKENIZER_FILES,
)


def of_an_export(name: str) -> bool:
    """Whether an export of some model may have a file of this name, which readers of another one would open, too."""
    return any(fnmatch(name, one) for one in _NAMES)


def refuse_others_files(target: Path, recorded: Iterable[str] = ()) -> None:
    """For a folder that is about to be replaced as a whole: everything in it must be of an export.

    Args:
        target: The folder.
        recorded: Names that the export there says it consists of.

    Raises:
        UserError: it is no export, or other things lie in it (they are named).
    """
    names = {path.name for path in target.iterdir()}
    if not names & set(CONFIGS):
        raise UserError(f"{target}: holds other files and is no earlier export; give a folder that does not exist.")
    known = {*recorded, CARD, f".{RECORD}"}
    others = sorted(name for name in names if name not in known and not of_an_export(name))
    if others:
        shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        raise UserError(
            f"{target}: holds {shown}, which no export has written and which would be lost; move them, or give a "
            "folder that does not exist."
        )
