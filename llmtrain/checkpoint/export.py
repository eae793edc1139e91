"""``llmtrain export``: a training checkpoint becomes a Hugging Face folder, proven equal before it appears."""

import json
import os
import shutil
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.compare import compare_with_transformers
from llmtrain.checkpoint.hugging_face import is_hugging_face_folder, write_hf_folder
from llmtrain.checkpoint.layouts import choose_layout
from llmtrain.checkpoint.resolve import locate
from llmtrain.checkpoint.source import Source, open_source
from llmtrain.checkpoint.weights import InMemory
from llmtrain.errors import UserError
from llmtrain.hf_model.export import Written, write_adapters, write_merged
from llmtrain.hf_model.source import open_hf
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer, save_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD = "llmtrain_export.json"
"""Beside the weights: which checkpoint they are, and how that was proven."""
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how it was proven."""

    source: Path
    """The checkpoint that was exported."""
    target: Path
    parameters: int
    dtype: str
    size: int
    """Bytes of all files."""
    max_difference: float
    """Largest absolute difference of logits between our model and transformers' MPT, both in float32."""
    tolerance: float
    positions: int
    """Positions at which logits were compared."""
    tokens: int
    """Greedy tokens that were compared and are equal."""
    tokenizer: bool
    """Whether a tokenizer was written."""
    adapters: bool = False
    """Whether it is adapters alone, for PEFT."""
    done_before: bool = False
    """The target held this very export already; nothing was written."""

    def __str__(self) -> str:
        lines = [
            f"{self.target} is the export of {self.source} already; nothing to do"
            if self.done_before
            else f"Exported {self.source} to {self.target}",
            f"  {self.parameters:,} parameters in {self.dtype}, {self.size / 1e6:,.1f} MB"
            + ("" if self.tokenizer else "; WITHOUT a tokenizer: none is known for this checkpoint"),
            f"  opened by {'PEFT on the base model' if self.adapters else 'plain transformers: all tensors equal'}, "
            f"logits within {self.max_difference:.1e} "
            f"(allowed: {self.tolerance:.1e}) at {self.positions} positions, {self.tokens} greedy tokens equal",
        ]
        return "\n".join(lines)


def export(
    source: Path,
    target: Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    recipe: Path | None = None,
    max_shard_size: int | str = "5GB",
    adapter_only: bool = False,
) -> ExportReport:
    """Write a Hugging Face folder that plain ``AutoModelForCausalLM.from_pretrained`` opens, and prove it.

    Everything is written into a hidden folder beside the target, opened there by transformers and compared with the
    source (:mod:`llmtrain.checkpoint.compare`); only then is it renamed. On any failure nothing is left. An export that
    stands there already is left as it is.

    Args:
        source: A run, its ``checkpoints/`` folder, a checkpoint, ``latest``, a ``.pt`` file, or a Hugging Face folder.
        target: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (or fp32, bf16, fp16).
        overwrite: Replace an earlier export at the target.
        recipe: The YAML file with the model's config, for a checkpoint that carries none.
        max_shard_size: Largest weights file, in bytes or as text.
        adapter_only: Write the adapters of a LoRA run alone (adapter_config.json, adapter_model.safetensors) instead of
            merging them into the weights.

    Raises:
        UserError: the source cannot be read, transformers' MPT cannot express it, the target is taken, the weights do
            not survive the cast, or the comparison finds a difference.
    """
    name = _SHORT.get(dtype, dtype)
    if name not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}.")
    if (before := _done_before(source, target, name, adapter_only)) is not None:
        return before
    _refuse_taken(target, overwrite)
    hugging_face = open_hf(source, recipe)
    if adapter_only and hugging_face is None:
        raise UserError(f"{source}: --adapter-only is for runs with `model.peft_config`; this is an MPT.")
    opened = hugging_face or open_source(source, recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.exporting-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        (staging / "out").mkdir()
        if isinstance(opened, Source):
            made = _write_mpt(opened, staging, name, max_shard_size)
        elif adapter_only:
            made = write_adapters(opened, staging / "out", dtype=name)
        else:
            made = write_merged(opened, staging / "out", dtype=name, max_shard_size=max_shard_size)
        if made.comparison.problems:
            raise UserError(
                f"{opened.path} was NOT exported: transformers opens the result as another function. "
                + "; ".join(made.comparison.problems)
            )
        size = sum(file.stat().st_size for file in (staging / "out").iterdir())
        report = ExportReport(
            source=opened.path,
            target=target,
            parameters=made.parameters,
            dtype=name,
            size=size,
            max_difference=made.comparison.max_difference,
            tolerance=made.comparison.tolerance,
            positions=made.comparison.positions,
            tokens=made.comparison.tokens,
            tokenizer=made.tokenizer,
            adapters=adapter_only,
        )
        _record(report, staging / "out")
        _move_into_place(staging / "out", target, staging / "old")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _write_mpt(source: Source, staging: Path, dtype: str, max_shard_size: int | str) -> Written:
    layout = choose_layout(source.config, with_code=False, where=str(source.path))
    weights = _cast(source, dtype)
    tokenizer = _tokenizer_folder(source, staging / "tokenizer")
    out = staging / "out"
    write_hf_folder(out, source.config, weights, dtype=dtype, tokenizer=tokenizer, max_shard_size=max_shard_size)
    result = compare_with_transformers(out, layout, source.config, InMemory(weights), tokenizer)
    return Written(sum(value.numel() for value in weights.values()), result, tokenizer is not None)


def _checksum(checkpoint: Path) -> str | None:
    """Tells one checkpoint from another; None for one without a manifest."""
    file = checkpoint / manifest.MANIFEST
    return xxhash.xxh3_128(file.read_bytes()).hexdigest() if file.is_file() else None


def _record(report: ExportReport, folder: Path) -> None:
    content = {field.name: getattr(report, field.name) for field in fields(report) if field.name != "done_before"}
    content |= {"source": str(report.source), "target": str(report.target), "checksum": _checksum(report.source)}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n")


def _done_before(source: Path, target: Path, dtype: str, adapters: bool) -> ExportReport | None:
    """The report of an earlier export of the same checkpoint in the same dtype, when the target holds it."""
    try:
        content = json.loads((target / RECORD).read_text())
        checksum = content.pop("checksum")
        if checksum is None or (content["dtype"], content.get("adapters", False)) != (dtype, adapters):
            return None
        if checksum != _checksum(locate(source)):
            return None
        return ExportReport(**{**content, "source": Path(content["source"]), "target": target}, done_before=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or target.is_file():
        raise UserError(
            f"{target}: is a {'link' if target.is_symlink() else 'file'}; give a folder that does not exist."
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not is_hugging_face_folder(target) and not (target / "adapter_config.json").is_file():
        raise UserError(f"{target}: holds other files and is no earlier export; give a folder that does not exist.")
    if not overwrite:
        raise UserError(
            f"{target}: there is an export already; pass --overwrite to replace it, or give another folder."
        )


def _cast(source: Source, dtype: str) -> dict[str, Tensor]:
    """The weights in the dtype of the export.

    Raises:
        UserError: a value is not finite, before the cast or after it.
    """
    weights = {}
    for name, value in source.weights.items():
        cast = value.to(DTYPES[dtype])
        if not torch.isfinite(cast).all():
            if torch.isfinite(value).all():
                raise UserError(
                    f"{source.path}: `{name}` does not fit into {dtype} (it overflows); use bfloat16 or float32."
                )
            raise UserError(
                f"{source.path}: `{name}` holds NaN or infinity: the training broke; take an older checkpoint."
            )
        weights[name] = cast
    return weights


def _tokenizer_folder(source: Source, staging: Path) -> Path | None:
    if source.tokenizer is None:
        return None
    folder = Path(source.tokenizer.name).expanduser()
    if folder.is_dir() and source.tokenizer == TokenizerConfig(name=source.tokenizer.name):
        return folder
    save_tokenizer(load_tokenizer(source.tokenizer), staging)
    return staging


def _move_into_place(made: Path, target: Path, old: Path) -> None:
    if target.is_dir():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.is_dir() and not target.exists():
            old.rename(target)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
