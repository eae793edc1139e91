"""Hugging Face folders in and out: config.json, weights, tokenizer, generation_config.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrain.checkpoint.hugging_face_config import from_hugging_face
from llmtrain.checkpoint.layouts import Layout, choose_layout
from llmtrain.checkpoint.layouts.reading import mpt_weights
from llmtrain.checkpoint.names import check_shapes, under_own_names
from llmtrain.checkpoint.tokenizer_files import copy_tokenizer
from llmtrain.checkpoint.weights import InMemory, Weights
from llmtrain.checkpoint.weights_files import WeightsFormat, open_tensors, size_in_bytes, write_weights
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.model.config import MPTConfig

MAX_SHARD_SIZE = "5GB"


def is_hugging_face_folder(path: Path) -> bool:
    """Whether the folder holds a config.json."""
    return (path / "config.json").is_file()


def write_hf_folder(
    folder: Path,
    config: MPTConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: str,
    tokenizer: Path | None,
    layout: Layout | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    weights_format: WeightsFormat = "safetensors",
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` opens. One tensor is held at a time.

    A tied head is not written: transformers ties it again by itself, without a warning.

    Args:
        folder: An existing, empty folder.
        config: Of the model.
        weights: By MPT's names, in the dtype to be written; `Weights` are read one tensor at a time.
        dtype: The name of that dtype, for config.json.
        tokenizer: Folder whose tokenizer files are copied, or None.
        layout: Chosen for the config; plain MPT or Llama when left out.
        max_shard_size: Bytes, or text such as ``5GB``; larger models get several files and an index.
        weights_format: ``safetensors``, or ``bin`` for software that reads nothing else.
        advance: Told the bytes of each tensor that was written.

    Raises:
        UserError: the tokenizer does not belong to the model, the size is none, or no layout fits.
    """
    layout = layout or choose_layout(config, with_code=False, where=str(folder))
    weights = weights if isinstance(weights, Weights) else InMemory(weights)
    limit = size_in_bytes(max_shard_size)
    token_ids = copy_tokenizer(tokenizer, folder, config.vocab_size) if tokenizer is not None else {}
    write_json(folder / "config.json", layout.config_json(config, dtype, token_ids))
    known: dict[str, Any] = {name: value for name, value in token_ids.items() if value is not None}
    if tokenizer is not None and (ends := ends_of_turns(folder)):
        known["eos_token_id"] = ends
    write_json(folder / "generation_config.json", known)
    for name, text in layout.files().items():
        (folder / name).write_bytes(text.encode())
    write_weights(folder, layout.weights(config, weights), limit, weights_format, advance)


def ends_of_turns(folder: Path) -> list[int]:
    """Where generation must stop in a folder whose tokenizer has a chat template; else []."""
    if not (folder / "chat_template.jinja").is_file() and not (
        (folder / "tokenizer_config.json").is_file()
        and read_json(folder / "tokenizer_config.json").get("chat_template")
    ):
        return []
    from llmtrain.stop_tokens import stop_ids
    from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

    ends = stop_ids(load_tokenizer(TokenizerConfig(name=str(folder))))
    return list(ends) if len(ends) > 1 else []


def read_hf_folder(path: Path) -> tuple[MPTConfig, Weights]:
    """Open an MPT in a Hugging Face folder: safetensors, or ``.bin`` without running what is in it.

    Transformers' own layout and the older one of MosaicML's remote code; Llama and Mistral, which are MPTs with rotary
    positions and a gate; exports with llmtrain's modelling file, which is not run. One file or several with an index; a
    tied ``lm_head.weight`` is dropped.

    Returns:
        The config, and the parameters by MPT's names, each read when it is asked for, in the dtype of the file.

    Raises:
        UserError: no config, no weights, not MPT, or weights that do not fit the config (they are named).
    """
    data = read_json(path / "config.json")
    config = from_hugging_face(data, str(path / "config.json"))
    weights = under_own_names(mpt_weights(data, open_tensors(path)), config, str(path))
    check_shapes(config, weights.shapes(), str(path))
    return config, weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder.

    Raises:
        UserError: it is not there, cannot be read, or is none.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a Hugging Face folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object of a Hugging Face folder."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
