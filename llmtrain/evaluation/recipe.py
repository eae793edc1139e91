"""A YAML file becomes an EvalRecipe, or it is found to be a training recipe. Light: never imports torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config.load import load
from llmtrain.config.safe_yaml import YAMLMistake, read_yaml
from llmtrain.evaluation.config import EvalRecipe
from llmtrain.recipe.check import trust_lines
from llmtrain.recipe.load import name_components, spread_length
from llmtrain.redaction import redact

_OF_TRAINING = ("max_duration", "optimizer", "train_loader", "scheduler", "global_train_batch_size")
_OF_EVALUATION = ("models", "load_path", "model", "model_name", "harness", "icl_tasks", "eval_gauntlet")
_ONE_MODEL = ("model_name", "load_path", "model", "tokenizer")


def is_eval_recipe(path: Path) -> bool:
    """Whether a YAML file is an evaluation recipe: it has `models`, or nothing that only training has.

    A file that cannot be read is none of either; the loader of training recipes then says what is wrong with it.
    """
    try:
        data = read_yaml(path)
    except YAMLMistake:
        return False
    if not isinstance(data, dict):
        return False
    if "models" in data or "harness" in data:
        return True
    return not any(key in data for key in _OF_TRAINING) and any(key in data for key in _OF_EVALUATION)


def load_eval_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EvalRecipe:
    """Load, resolve, gather a single model into `models`, fan out `max_seq_len`, validate.

    Args:
        path: the YAML file.
        overrides: `key=value`, stronger than the file.

    Raises:
        ConfigError: with every mistake that was found.
    """

    def prepare(data: dict[str, Any]) -> dict[str, Any]:
        data = _spread(_one_model_is_a_list(data))
        if not data.get("run_name"):
            data["run_name"] = os.environ.get("RUN_NAME") or Path(path).stem
        return data

    return load(path, EvalRecipe, overrides, prepare=prepare)


def check(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """What `llmtrain check` prints of an evaluation recipe: the keys that it gives, resolved, below its notes.

    Raises:
        ConfigError: with every mistake that was found.
    """
    recipe = load_eval_recipe(path, overrides)
    models = f"{len(recipe.models)} model{'s' if len(recipe.models) > 1 else ''}"
    losses, tasks = len(recipe.eval_loader), len(recipe.icl_tasks) + len(recipe.harness.tasks if recipe.harness else ())
    lines = [f"{path}: a valid evaluation recipe: {models}, {losses} of data, {tasks} of tasks.", *recipe.notes()]
    lines += trust_lines(recipe)
    given = redact(recipe.model_dump(mode="json", exclude_unset=True))
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join(f"# {line}" for line in lines) + "\n" + text


def _one_model_is_a_list(data: dict[str, Any]) -> dict[str, Any]:
    """What stands at the top for one model, as in a training recipe, goes into `models`."""
    if "models" in data or not any(key in data for key in _ONE_MODEL):
        return data
    rest = {key: value for key, value in data.items() if key not in _ONE_MODEL}
    return {**rest, "models": [{key: data[key] for key in _ONE_MODEL if key in data}]}


def _spread(data: dict[str, Any]) -> dict[str, Any]:
    """`max_seq_len` to models, tokenizers and loaders that do not have their own; names where they may be left out.

    Of several lengths the longest: rows of shards are joined and cut at evaluation.
    """
    length = data.get("max_seq_len")
    longest = max((n for n in length if isinstance(n, int)), default=1) if isinstance(length, list) else length
    data = name_components(spread_length({**data, "max_seq_len": longest}))
    models = data.get("models")
    if isinstance(models, list):
        data["models"] = [
            name_components(spread_length({**model, "max_seq_len": longest})) if isinstance(model, dict) else model
            for model in models
        ]
        for model in data["models"]:
            if isinstance(model, dict):
                model.pop("max_seq_len", None)
    return {**data, "max_seq_len": length} if length is not None else data
