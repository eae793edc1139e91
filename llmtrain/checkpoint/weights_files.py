"""The weights files of a Hugging Face folder: safetensors or ``.bin``, one file or several and an index."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llmtrain.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from llmtrain.checkpoint.torch_file import open_torch_file
from llmtrain.checkpoint.torch_file_writer import write_torch_file
from llmtrain.checkpoint.weights import Joined, Weights
from llmtrain.errors import UserError
from llmtrain.inside import why_outside
from llmtrain.json_text import parse_json

WeightsFormat = Literal["safetensors", "bin"]
_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
_UNITS = {"": 1, **{f"{p}B": 1000**n for n, p in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate(("K", "M", "G", "T"), start=1)}


def open_tensors(folder: Path) -> Weights:
    """The tensors of a Hugging Face folder, whatever model it is, by the names in its files.

    Raises:
        UserError: no weights, damaged, or files that do not hold what their index says.
    """
    files, index = _weight_files(folder)
    weights = Joined([_open_file(file) for file in files], str(folder))
    if index is not None and (missing := sorted(index - set(weights))):
        raise UserError(f"{folder}: its files do not hold `{missing[0]}` and {len(missing) - 1} others of its index.")
    if index is not None and (unknown := sorted(set(weights) - index)):
        raise UserError(f"{folder}: its index does not name `{unknown[0]}` and {len(unknown) - 1} others of its files.")
    return weights


def _weight_files(folder: Path) -> tuple[list[Path], set[str] | None]:
    """The files, and the names that their index lists."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():  # first, as transformers does: the index beside it is left of an earlier save
            return [folder / single], None
        if (folder / index).is_file():
            weight_map = _read_index(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{folder / index}: has no weight_map.")
            names = sorted({str(name) for name in weight_map.values()})
            for name in names:
                if why_outside(name) or Path(name).name != name:
                    raise UserError(f"{folder / index}: `{name}` is no name of a file in this folder; refused.")
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: missing, but named in {index}.")
            return [folder / name for name in names], set(weight_map)
    raise UserError(f"{folder}: no weights (model.safetensors or pytorch_model.bin, with or without an index).")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def _open_file(file: Path) -> Weights:
    if file.suffix == ".safetensors":
        return SafetensorsFile(file)
    found = open_torch_file(file)
    if found is None:
        raise UserError(f"{file}: holds more than tensors.")
    return found


def write_weights(
    folder: Path,
    weights: Weights,
    limit: int,
    weights_format: WeightsFormat,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write tensors under the file names that transformers looks for: one file, or several and an index.

    Args:
        folder: Where to.
        weights: By the names that the files shall have.
        limit: Bytes of tensors in a file; a larger tensor gets one of its own.
        weights_format: The kind of file.
        advance: Told the bytes of each tensor that was written.
    """
    stem, suffix = _STEMS[weights_format], weights_format
    parts = shards(weights, limit)
    index: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = f"{stem}.{suffix}" if len(parts) == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        if weights_format == "safetensors":
            write_safetensors(folder / file, weights, names, advance)
        else:
            write_torch_file(folder / file, weights, names, advance=advance)
        index |= dict.fromkeys(names, file)
    if len(parts) > 1:
        content = {"metadata": {"total_size": weights.total_size()}, "weight_map": index}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shards(weights: Weights, limit: int) -> list[list[str]]:
    """Names in their order, cut into parts of at most `limit` bytes (one tensor may be more); at least one part."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name in weights:
        size = weights.size(name)
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def size_in_bytes(size: int | str) -> int:
    """``5GB`` (10^9), ``512MiB`` (2^20) or a number of bytes.

    Raises:
        UserError: it is no positive size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"--max-shard-size {size}: give a size such as 5GB, 500MB or 2GiB.")
    return max(1, int(float(found[1]) * _UNITS[found[2].upper()]))
