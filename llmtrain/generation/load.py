"""A model and its tokenizer, ready to generate, from a run, a checkpoint or an export."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtrain.checkpoint.source import open_source
from llmtrain.errors import UserError
from llmtrain.hf_model.load import cast
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.hf_model.source import HFSource, open_hf
from llmtrain.model.kernels.denormals import flush_denormals
from llmtrain.model.mpt import MPT
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    path: Path, *, recipe: Path | None = None, device: str | None = None, dtype: str | None = None
) -> tuple[MPT | HFCausalLM, "PreTrainedTokenizerFast"]:
    """Load a model in evaluation mode, and its tokenizer.

    Args:
        path: A run, its ``checkpoints/`` folder, a checkpoint, a ``.pt`` file, or an export (Hugging Face folder).
        recipe: The YAML file with model and tokenizer, for a checkpoint that carries none.
        device: ``cpu``, ``cuda``, ``cuda:1``; by default a GPU if there is one.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``; by default bfloat16 on a GPU, float32 on the CPU.

    Raises:
        UserError: nothing usable there, or no tokenizer is known.
    """
    flush_denormals()  # chat, generation and evaluation start here
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    name = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in DTYPES:
        raise UserError(f"dtype {dtype}: use one of {', '.join(DTYPES)}.")
    if (found := open_hf(path, recipe)) is not None:
        return _hugging_face(found, device, DTYPES[name])
    source = open_source(path, recipe)
    tokenizer = _tokenizer(source.tokenizer, path)
    if len(tokenizer) > source.config.vocab_size:
        raise UserError(
            f"{tokenizer.name_or_path}: {len(tokenizer):,} tokens, but the model has {source.config.vocab_size:,} "
            "embeddings: they do not belong together."
        )
    model = MPT(source.config, device="meta")
    weights = {key: value.to(device, DTYPES[name]) for key, value in source.weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval(), tokenizer


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UserError: there is no such device.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device}: no such device. Use cpu, cuda, or cuda:1 for the second GPU.") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= (n := torch.cuda.device_count()):
        raise UserError(f"device {device}: torch sees {n} GPUs here. Use --device cpu, or leave it out.")


def _hugging_face(found: HFSource, device: str, dtype: torch.dtype) -> tuple[HFCausalLM, "PreTrainedTokenizerFast"]:
    tokenizer = _tokenizer(found.tokenizer, found.path)
    return HFCausalLM(cast(found.model, dtype), found.peft).eval().to(device), tokenizer


def _tokenizer(known: TokenizerConfig | None, path: Path) -> "PreTrainedTokenizerFast":
    if known is None:
        raise UserError(
            f"{path}: no tokenizer is known for this model (no tokenizer.json beside it, no recipe). "
            "Pass its recipe: --recipe yamls/x.yaml"
        )
    return load_tokenizer(known)
