"""``llmtrain import``: weights from wherever they were made become a checkpoint of ours, proven equal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.hugging_face import is_hugging_face_folder
from llmtrain.checkpoint.read import read_weights, recipe_of
from llmtrain.checkpoint.sharded_writer import write_sharded
from llmtrain.checkpoint.source import TOKENIZER, Source, open_source
from llmtrain.checkpoint.staging import move_into_place, refuse_place, staging
from llmtrain.checkpoint.tokenizer_files import copy_tokenizer, tokenizer_folder
from llmtrain.checkpoint.torch_file_writer import write_torch_file
from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError
from llmtrain.progress import progress
from llmtrain.tokenizer import fingerprint

To = Literal["sharded", "full"]


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote."""

    source: Path
    target: Path
    to: To
    parameters: int
    tensors: int
    dtypes: tuple[str, ...]
    size: int
    """Bytes of the weights' files."""
    tokenizer: bool
    """Whether a tokenizer was written."""

    def __str__(self) -> str:
        dtypes = " and ".join(self.dtypes)
        return (
            f"Imported {self.source} to {self.target} ({self.to})\n"
            f"  {self.parameters:,} parameters in {dtypes}, {self.size / 1e6:,.1f} MB"
            + ("" if self.tokenizer else "; WITHOUT a tokenizer: none is known for it")
            + f"\n  opened again: all {self.tensors} tensors bitwise equal\n"
            f"  start from it with model.pretrained={self.target}, "
            f"or with load_path={self.target} load_weights_only=true"
        )


def import_weights(
    source: Path,
    target: Path,
    *,
    to: To = "sharded",
    recipe: Path | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Write a checkpoint of weights that `load_path`, `model.pretrained` and every command of llmtrain accept.

    Tensors keep their dtype and are moved one at a time. The result is opened again and compared bitwise with the
    source before it appears; on any failure nothing is left.

    Args:
        source: A Hugging Face MPT (transformers' own layout or MosaicML's, safetensors or ``.bin``), a sharded or full
            checkpoint of llm-foundry's or any Composer trainer's, or a run or checkpoint of ours.
        target: The checkpoint's folder to make.
        to: ``sharded`` (for any number of ranks) or ``full`` (one ``.pt`` file).
        recipe: The YAML file with the model's config, for a checkpoint that carries none.
        overwrite: Replace a checkpoint at the target.

    Raises:
        UserError: the source cannot be read or is no MPT, the target is taken or cannot be written, or what was written
            is not what was read.
    """
    if to not in get_args(To):
        raise UserError(f"--to {to}: use one of {', '.join(get_args(To))}.")
    refuse_place(target)
    _refuse_taken(target, overwrite)
    opened = open_source(source, recipe)
    if target.exists() and target.resolve() == opened.path.resolve():
        raise UserError(f"{target}: is the source itself; give another folder.")
    weights = opened.weights
    with staging(target, "importing", weights.total_size()) as folder:
        out = folder / "out"
        out.mkdir()
        with progress(Console(stderr=True), "writing weights", weights.total_size(), "bytes") as advance:
            if to == "sharded":
                write_sharded(out, weights, advance)
            else:
                write_torch_file(
                    out / "full.pt",
                    weights,
                    list(weights),
                    lambda tensors: {"state": {"model": {f"model.{name}": value for name, value in tensors.items()}}},
                    advance,
                )
        files = {file.name: manifest.file_entry(file) for file in out.iterdir()}
        has_tokenizer = _add_tokenizer(opened, out, folder / "tokenizer")
        before = opened.path if opened.path.is_dir() else opened.path.parent
        known = manifest.read(before) if (before / manifest.MANIFEST).is_file() else None
        manifest.write(
            out,
            kind=to,
            step=known.step if known is not None else 0,
            tokens=known.tokens if known is not None else 0,
            files=files,
            recipe=_recipe(opened, recipe, target / TOKENIZER if has_tokenizer else None),
            tokenizer_fingerprint=fingerprint(str(out / TOKENIZER)) if has_tokenizer else None,
            weights_only=True,
        )
        if differing := _differing(weights, read_weights(out)[1]):
            raise UserError(f"{opened.path} was NOT imported: what was written differs in {differing[:6]}.")
        move_into_place(out, target, folder / "old")
    return ImportReport(
        source=opened.path,
        target=target,
        to=to,
        parameters=sum(weights.shape(name).numel() for name in weights),
        tensors=len(weights),
        dtypes=tuple(sorted({str(weights.dtype(name)).removeprefix("torch.") for name in weights})),
        size=sum(entry.size for entry in files.values()),
        tokenizer=has_tokenizer,
    )


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or target.is_file():
        kind = "link" if target.is_symlink() else "file"
        raise UserError(f"{target}: is a {kind}; give a folder that does not exist.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / manifest.MANIFEST).is_file():
        raise UserError(f"{target}: holds other files and is no checkpoint; give a folder that does not exist.")
    if not manifest.read(target).weights_only:
        raise UserError(f"{target}: is a checkpoint that training continues from; give a folder that does not exist.")
    if not overwrite:
        raise UserError(f"{target}: there is a checkpoint already; pass --overwrite to replace it.")


def _add_tokenizer(opened: Source, out: Path, made: Path) -> bool:
    place = tokenizer_folder(opened.tokenizer, made)
    if place is None:
        return False
    (out / TOKENIZER).mkdir()
    copy_tokenizer(place, out / TOKENIZER, opened.config.vocab_size)
    return True


def _recipe(opened: Source, recipe: Path | None, tokenizer: Path | None) -> dict[str, Any]:
    """What is known of the recipe; the model's block whole, and none of where its weights came from."""
    found: dict[str, Any] = {}
    if not is_hugging_face_folder(opened.path):
        found = dict(recipe_of(opened.path, recipe) or {})
    found["model"] = opened.config.model_dump(mode="json") | {"pretrained": None}
    found.setdefault("max_seq_len", opened.config.max_seq_len)
    if tokenizer is not None:
        found["tokenizer"] = {"name": str(tokenizer.absolute())}
    return found


def _differing(wanted: Weights, found: Weights) -> list[str]:
    if set(wanted) != set(found):
        return sorted(set(wanted) ^ set(found))
    return [name for name in wanted if not same_bits(wanted, found, name)]


def same_bits(one: Weights, other: Weights, name: str) -> bool:
    """Whether a tensor has the same shape, dtype and bits in both."""
    a, b = one[name].contiguous(), other[name].contiguous()
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
