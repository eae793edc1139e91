"""``llmtrain export``: a training checkpoint becomes a Hugging Face folder, proven equal before it appears."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import xxhash
from rich.console import Console

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.cast import DTYPES, Cast
from llmtrain.checkpoint.compare import compare_with_transformers
from llmtrain.checkpoint.exported_files import RECORD, refuse_others_files
from llmtrain.checkpoint.hugging_face import MAX_SHARD_SIZE, is_hugging_face_folder, write_hf_folder
from llmtrain.checkpoint.layouts import Layout, choose_layout
from llmtrain.checkpoint.model_card import CARD, CardFacts, model_card
from llmtrain.checkpoint.read import recipe_of
from llmtrain.checkpoint.resolve import locate
from llmtrain.checkpoint.source import Source, open_source
from llmtrain.checkpoint.staging import move_into_place, refuse_place, staging
from llmtrain.checkpoint.tokenizer_files import tokenizer_folder
from llmtrain.checkpoint.weights_files import WeightsFormat, size_in_bytes
from llmtrain.errors import UserError
from llmtrain.hf_model.export import Written, write_adapters, write_merged
from llmtrain.hf_model.source import HFSource, open_hf
from llmtrain.progress import progress

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
    weights_format: str = "safetensors"
    layout: str | None = "mpt"
    """Of which of transformers' classes it is; None for a model that is no MPT."""
    reason: str | None = None
    """Why it is not plain MPT."""
    done_before: bool = False
    """The target held this very export already; nothing was written."""

    def __str__(self) -> str:
        by = "transformers with trust_remote_code=True" if self.layout == "code" else "plain transformers"
        lines = [
            f"{self.target} is the export of {self.source} already; nothing to do"
            if self.done_before
            else f"Exported {self.source} to {self.target}",
            f"  {self.parameters:,} parameters in {self.dtype}, {self.size / 1e6:,.1f} MB"
            + ("" if self.tokenizer else "; WITHOUT a tokenizer: none is known for this checkpoint"),
            *([f"  {self.reason}"] if self.reason else []),
            f"  opened by {'PEFT on the base model' if self.adapters else by + ': all tensors equal'}, "
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
    max_shard_size: int | str = MAX_SHARD_SIZE,
    adapter_only: bool = False,
    with_code: bool = False,
    weights_format: WeightsFormat = "safetensors",
    license: str | None = None,
) -> ExportReport:
    """Write a Hugging Face folder that plain ``AutoModelForCausalLM.from_pretrained`` opens, and prove it.

    Everything is written into a hidden folder beside the target, opened there by transformers and compared with the
    source (:mod:`llmtrain.checkpoint.compare`); only then is it renamed. On any failure nothing is left. An export that
    stands there already is left as it is. An MPT is read, written and compared tensor by tensor, so it never has to fit
    into memory.

    Args:
        source: A run, its ``checkpoints/`` folder, a checkpoint, ``latest``, a ``.pt`` file, or a Hugging Face folder.
        target: The folder to make.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (or fp32, bf16, fp16).
        overwrite: Replace an earlier export at the target.
        recipe: The YAML file with the model's config, for a checkpoint that carries none.
        max_shard_size: Largest weights file, in bytes or as text.
        adapter_only: Write the adapters of a LoRA run alone (adapter_config.json, adapter_model.safetensors) instead of
            merging them into the weights.
        with_code: Allow a modelling file of ours beside the weights, where no class of transformers expresses the
            model; the folder then opens with ``trust_remote_code=True`` only.
        weights_format: ``safetensors``, or ``bin`` for software that reads nothing else.
        license: For the model card; ``metadata.license`` of the recipe when left out.

    Raises:
        UserError: the source cannot be read, no layout can express it, the target is taken, the weights do not survive
            the cast, or the comparison finds a difference.
    """
    name = _SHORT.get(dtype, dtype)
    if name not in DTYPES:
        raise UserError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}.")
    if weights_format not in get_args(WeightsFormat):
        raise UserError(f"--weights-format {weights_format}: use one of {', '.join(get_args(WeightsFormat))}.")
    options = {
        "dtype": name,
        "adapters": adapter_only,
        "weights_format": weights_format,
        "with_code": with_code,
        "max_shard_size": size_in_bytes(max_shard_size),
        "license": license,
        "recipe": None if recipe is None or not recipe.is_file() else xxhash.xxh3_128(recipe.read_bytes()).hexdigest(),
    }
    if (before := _done_before(source, target, options)) is not None:
        return before
    refuse_place(target)
    _refuse_taken(target, overwrite)
    hugging_face = open_hf(source, recipe)
    if hugging_face is None and adapter_only:
        raise UserError(f"{source}: --adapter-only is for runs with `model.peft_config`; this is an MPT.")
    if hugging_face is not None and weights_format != "safetensors":
        raise UserError(f"{source}: --weights-format {weights_format} is for MPT; other models get safetensors.")
    opened = hugging_face or open_source(source, recipe)
    _refuse_itself(opened, target)
    layout: Layout | None = None
    need = 0
    if isinstance(opened, Source):
        layout = choose_layout(opened.config, with_code=with_code, where=str(opened.path))
        need = sum(opened.weights.shape(each).numel() for each in opened.weights) * DTYPES[name].itemsize
    with staging(target, "exporting", need) as folder:
        out = folder / "out"
        out.mkdir()
        if isinstance(opened, Source):
            assert layout is not None
            made = _write_mpt(opened, layout, folder, name, max_shard_size, weights_format)
        elif adapter_only:
            made = write_adapters(opened, out, dtype=name)
        else:
            made = write_merged(opened, out, dtype=name, max_shard_size=max_shard_size)
        if made.comparison.problems:
            raise UserError(
                f"{opened.path} was NOT exported: transformers opens the result as another function. "
                + "; ".join(made.comparison.problems)
            )
        facts = CardFacts(
            made.parameters,
            name,
            made.comparison.max_difference,
            made.comparison.tolerance,
            made.comparison.positions,
            made.comparison.tokens,
            tokenizer=made.tokenizer,
            adapters=adapter_only,
        )
        card = model_card(
            opened.path,
            layout=layout,
            config=opened.config if isinstance(opened, Source) else None,
            facts=facts,
            name=target.name,
            recipe=None if is_hugging_face_folder(opened.path) else recipe_of(opened.path, recipe),
            license=license,
        )
        (out / CARD).write_text(card, encoding="utf-8")
        report = ExportReport(
            source=opened.path,
            target=target,
            parameters=made.parameters,
            dtype=name,
            size=sum(file.stat().st_size for file in out.iterdir()),
            max_difference=made.comparison.max_difference,
            tolerance=made.comparison.tolerance,
            positions=made.comparison.positions,
            tokens=made.comparison.tokens,
            tokenizer=made.tokenizer,
            adapters=adapter_only,
            weights_format=weights_format,
            layout=layout.name if layout is not None else None,
            reason=layout.reason if layout is not None else None,
        )
        _record(report, out, options)
        move_into_place(out, target, folder / "old")
    return report


def _write_mpt(
    source: Source,
    layout: Layout,
    staged: Path,
    dtype: str,
    max_shard_size: int | str,
    weights_format: WeightsFormat,
) -> Written:
    weights = Cast(source.weights, dtype, source.path)
    tokenizer = tokenizer_folder(source.tokenizer, staged / "tokenizer")
    with progress(Console(stderr=True), "writing weights", weights.total_size(), "bytes") as advance:
        write_hf_folder(
            staged / "out",
            source.config,
            weights,
            dtype=dtype,
            tokenizer=tokenizer,
            layout=layout,
            max_shard_size=max_shard_size,
            weights_format=weights_format,
            advance=advance,
        )
    result = compare_with_transformers(staged / "out", layout, source.config, weights, tokenizer)
    parameters = sum(weights.shape(name).numel() for name in weights)
    return Written(parameters, result, tokenizer is not None)


def _checksum(checkpoint: Path) -> str | None:
    """Tells one checkpoint from another; None for one without a manifest."""
    file = checkpoint / manifest.MANIFEST
    return xxhash.xxh3_128(file.read_bytes()).hexdigest() if file.is_file() else None


def _record(report: ExportReport, folder: Path, options: Mapping[str, Any]) -> None:
    content = {field.name: getattr(report, field.name) for field in fields(report) if field.name != "done_before"}
    content |= {"source": str(report.source), "target": str(report.target), "checksum": _checksum(report.source)}
    content |= {"options": options, "files": _sizes(folder)}
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n")


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != RECORD}


def _done_before(source: Path, target: Path, options: Mapping[str, Any]) -> ExportReport | None:
    """The report of an earlier export of the same checkpoint with the same options, when the target holds all of it."""
    content = _recorded(target)
    checksum = content.pop("checksum", None)
    try:
        if checksum is None or content.pop("options") != options or content.pop("files") != _sizes(target):
            return None
        if checksum != _checksum(locate(source)):
            return None
        return ExportReport(**{**content, "source": Path(content["source"]), "target": target}, done_before=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_itself(opened: Source | HFSource, target: Path) -> None:
    """The target is replaced, so it must not be what is exported, nor what adapters were trained on."""
    base = None if isinstance(opened, Source) else opened.config.pretrained_model_name_or_path
    for place in (opened.path, *([Path(base).expanduser()] if base else [])):
        if target.exists() and place.exists() and place.resolve().is_relative_to(target.resolve()):
            raise UserError(f"{target}: is or holds what is exported ({place}); give another folder.")


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or target.is_file():
        raise UserError(
            f"{target}: is a {'link' if target.is_symlink() else 'file'}; give a folder that does not exist."
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    refuse_others_files(target, recorded=_recorded(target).get("files", {}))
    if not overwrite:
        raise UserError(
            f"{target}: there is an export already; pass --overwrite to replace it, or give another folder."
        )
