"""A training YAML becomes a Recipe. Light: costs a fraction of a second and never imports torch."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.config.load import load
from llmtrain.recipe.recipe import Recipe
from llmtrain.tokenizer import TokenizerConfig, tokenizer_size

SHAPE = ("d_model", "n_heads", "n_layers")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load, resolve, fan out `max_seq_len`, validate.

    Args:
        path: The YAML file.
        overrides: `key=value`, stronger than the file.

    Raises:
        ConfigError: With every mistake that was found.
    """

    def prepare(data: dict[str, Any]) -> dict[str, Any]:
        data = keep_packed_examples_apart(take_shapes(name_components(spread_length(data))))
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


def take_shapes(data: dict[str, Any]) -> dict[str, Any]:
    """A model with a `pretrained` and without d_model, n_heads and n_layers takes what it leaves out from there.

    One that names the three is taken as it stands, so that it can be checked where the weights are not.

    Raises:
        UserError: There is no such model, or its tokenizer cannot be read.
    """
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("pretrained"), str):
        return data
    if model.get("name") != "mpt_causal_lm" or all(model.get(key) is not None for key in SHAPE):
        return data
    from llmtrain.checkpoint.pretrained import fill_model

    tokens = 0
    if model.get("vocab_size") is None:
        try:
            chat = any(loader.get("name") == "finetuning" for loader in _loaders(data))
            tokens = tokenizer_size(TokenizerConfig.model_validate(data.get("tokenizer")), chat=chat)
        except ValidationError:
            pass  # what is wrong with it is said in a moment, with its line
    return {**data, "model": fill_model(model, tokens)}


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
