"""A training YAML becomes a Recipe. Light: costs a fraction of a second and never imports torch."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.load import load
from llmtrain.recipe.recipe import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, resolve, fan out `max_seq_len`, validate.

    Args:
        path: The YAML file.
        overrides: `key=value`, stronger than the file.

    Raises:
        ConfigError: With every mistake that was found.
    """

    def prepare(data: dict[str, Any]) -> dict[str, Any]:
        data = keep_packed_examples_apart(name_components(spread_length(data)))
        if not data.get("run_name"):
            data["run_name"] = os.environ.get("RUN_NAME") or Path(path).stem
        return data

    return load(path, Recipe, overrides, prepare=prepare)


def spread_length(data: dict[str, Any]) -> dict[str, Any]:
    """Copy the top-level `max_seq_len` to the model, the tokenizer and the loaders that do not have their own."""
    length = data.get("max_seq_len")
    if not _counts(length):
        length = 1  # validation will refuse the knob itself; that it reached no other key needs no mention
    data = copy.deepcopy(data)
    _default(data.get("model"), "max_seq_len", length)
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, dict):
        if tokenizer.get("kwargs") is None:
            tokenizer["kwargs"] = {}
        _default(tokenizer["kwargs"], "model_max_length", length)
    for loader in _loaders(data):
        _default(loader.get("dataset"), "max_seq_len", length)
    return data


def name_components(data: dict[str, Any]) -> dict[str, Any]:
    """A model without a `name` is MPT, a loader without one reads text, as before there was another kind."""
    _default(data.get("model"), "name", "mpt_causal_lm")
    for loader in _loaders(data):
        _default(loader, "name", "text")
    return data


def keep_packed_examples_apart(data: dict[str, Any]) -> dict[str, Any]:
    """Where a loader packs several examples into a row, the model's attention stays within each of them."""
    model = data.get("model")
    datasets = [loader.get("dataset") for loader in _loaders(data) if loader.get("name") == "finetuning"]
    packed = any(isinstance(d, dict) and (d.get("packing") or d.get("packing_ratio")) for d in datasets)
    if packed and isinstance(model, dict) and model.get("name") == "mpt_causal_lm":
        if model.get("attn_config") is None:
            model["attn_config"] = {}
        _default(model["attn_config"], "attn_uses_sequence_id", True)
    return data


def _loaders(data: dict[str, Any]) -> list[dict[str, Any]]:
    evaluation = data.get("eval_loader")
    found = [data.get("train_loader"), *(evaluation if isinstance(evaluation, list) else [evaluation])]
    return [loader for loader in found if isinstance(loader, dict)]


def _counts(value: Any) -> bool:
    try:
        return int(value) > 0
    except (TypeError, ValueError):
        return False


def _default(block: Any, key: str, value: Any) -> None:
    if isinstance(block, dict) and block.get(key) is None:
        block[key] = value
