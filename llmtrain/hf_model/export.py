"""An `hf_causal_lm` run becomes a Hugging Face folder, or a folder of adapters, proven equal before it appears."""

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.compare import Comparison
from llmtrain.checkpoint.hugging_face import ends_of_turns
from llmtrain.checkpoint.tokenizer_files import copy_tokenizer
from llmtrain.errors import UserError
from llmtrain.hf_model.compare import compare_adapters, compare_folder, identity, merging_changes_nothing
from llmtrain.hf_model.load import DTYPES, cast
from llmtrain.hf_model.source import HFSource
from llmtrain.quiet_transformers import quiet_transformers
from llmtrain.tokenizer import load_tokenizer, save_tokenizer


@dataclass(frozen=True)
class Written:
    """What an export has put into its folder."""

    parameters: int
    comparison: Comparison
    tokenizer: bool


def write_merged(source: HFSource, folder: Path, *, dtype: str, max_shard_size: int | str) -> Written:
    """Writes config.json, safetensors and tokenizer; adapters are merged into the weights.

    Args:
        source: the model; its weights are used up.
        folder: an existing, empty folder.
        dtype: `float32`, `bfloat16` or `float16`.
        max_shard_size: largest weights file.

    Returns:
        What was written, and how it compares: all tensors, logits in float32, greedy tokens.

    Raises:
        UserError: weights are not finite, or the cast loses them, or merging changes the function.
    """
    model = cast(source.model, torch.float32)
    if source.peft is not None:
        model = merging_changes_nothing(source.peft)
    identities = _identities(model, dtype, source.path)
    out = cast(model, DTYPES[dtype])
    out.config.use_cache = True
    ids = _write_tokenizer(source, folder)
    for config in (out.config, out.generation_config):
        for key, value in ids.items():
            if value is not None and config is not None:
                setattr(config, key, value)
    if out.generation_config is not None and (ends := ends_of_turns(folder)):
        out.generation_config.eos_token_id = ends
    with quiet_transformers():
        out.save_pretrained(folder, max_shard_size=max_shard_size, safe_serialization=True)
    comparison = compare_folder(
        folder,
        cast(out, torch.float32),
        identities,
        DTYPES[dtype],
        trust_remote_code=source.config.trust_remote_code,
    )
    return Written(sum(p.numel() for p in out.parameters()), comparison, bool(ids))


def write_adapters(source: HFSource, folder: Path, *, dtype: str) -> Written:
    """Writes adapter_config.json, adapter_model.safetensors and the tokenizer; PEFT opens them on the base model.

    Raises:
        UserError: the run has no adapters, or they do not stand alone.
    """
    if source.peft is None:
        raise UserError(f"{source.path}: was trained without peft_config, so there are no adapters; export it whole.")
    if source.rows_added:
        raise UserError(
            f"{source.path}: its embeddings were grown for the tokenizer, so the adapters do not fit the base model. "
            "Export it merged (without --adapter-only)."
        )
    ids = _write_tokenizer(source, folder)
    with quiet_transformers():
        adapters = source.peft
        for parameter in source.peft.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(DTYPES[dtype])
        adapters.peft_config[
            adapters.active_adapter
        ].base_model_name_or_path = source.config.pretrained_model_name_or_path
        adapters.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
    comparison = compare_adapters(folder, source)
    return Written(sum(p.numel() for p in source.peft.parameters() if p.requires_grad), comparison, bool(ids))


def _write_tokenizer(source: HFSource, folder: Path) -> dict[str, int | None]:
    if source.tokenizer is None:
        return {}
    place = Path(source.tokenizer.name).expanduser()
    rows = int(source.model.get_input_embeddings().weight.shape[0])
    if place.is_dir() and not source.tokenizer.kwargs:
        return copy_tokenizer(place, folder, rows)
    staged = folder / f".tokenizer-{uuid.uuid4().hex[:8]}"
    save_tokenizer(load_tokenizer(source.tokenizer), staged)
    try:
        return copy_tokenizer(staged, folder, rows)
    finally:
        shutil.rmtree(staged)


def _identities(model: Any, dtype: str, where: Path) -> dict[str, str]:
    """Hashes of all tensors in the dtype of the export: copies of them would be a third model in memory."""
    found = {}
    for name, value in model.state_dict().items():
        written = value.to(DTYPES[dtype]) if value.is_floating_point() else value
        if not torch.isfinite(written).all():
            raise UserError(
                f"{where}: `{name}` does not fit into {dtype} (it overflows); use bfloat16 or float32."
                if torch.isfinite(value).all()
                else f"{where}: `{name}` holds NaN or infinity: the training broke; take an older checkpoint."
            )
        found[name] = identity(written)
    return found
