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
        data = spread_length(data)
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
    evaluation = data.get("eval_loader")
    for loader in [data.get("train_loader"), *(evaluation if isinstance(evaluation, list) else [evaluation])]:
        if isinstance(loader, dict):
            _default(loader.get("dataset"), "max_seq_len", length)
    return data


def _counts(value: Any) -> bool:
    try:
        return int(value) > 0
    except (TypeError, ValueError):
        return False


def _default(block: Any, key: str, value: Any) -> None:
    if isinstance(block, dict) and block.get(key) is None:
        block[key] = value
