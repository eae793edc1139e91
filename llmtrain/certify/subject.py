"""The recipe that is certified: the user's, made short enough to be trained twenty times over."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.durations import parse
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import n_params
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe

MOST_ON_CPU = 50_000_000
"""Parameters; more would take hours without a GPU."""

OWN_KEYS = ("run_name", "max_duration", "save_folder", "autoresume", "save_overwrite", "save_weights_only", "loggers")
"""Keys that certify sets: an override of one would be lost."""


@dataclass(frozen=True)
class Subject:
    """A recipe to certify.

    Attributes:
        name: of the recipe's file.
        data: the recipe as plain data, changed.
        changes: what was changed, a line each.
        steps: optimizer steps of the run.
        dropouts: keys that are not 0: what they draw depends on the number of ranks.
        elastic_problem: why another number of ranks gives other batches; None where it does not.
        on_gpu: whether the ranks train on GPUs.
    """

    name: str
    data: dict[str, Any]
    changes: tuple[str, ...]
    steps: int
    dropouts: tuple[str, ...]
    elastic_problem: str | None
    on_gpu: bool

    @property
    def evaluates(self) -> bool:
        """Whether the run has an evaluation."""
        return bool(self.data["eval_loader"])


def subject(path: Path, overrides: Sequence[str], *, steps: int, ranks: int) -> Subject:
    """Load a recipe and shorten it.

    Epochs are cut so that the run goes into its second one; it saves and evaluates several times. What the user has
    overridden stays.

    Args:
        path: the recipe.
        overrides: `key=value`, as for training.
        steps: optimizer steps of the run.
        ranks: most ranks that it will have.

    Raises:
        UserError: mistakes in it; the model is too large for this machine; an override of a key that is certify's.
    """
    given = {override.partition("=")[0].strip() for override in overrides}
    for key in sorted(given & set(OWN_KEYS)):
        hint = "give --steps" if key == "max_duration" else "certify sets it"
        raise UserError(f"{key}: cannot be overridden here; {hint}.")
    recipe = load_recipe(path, overrides)
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    _refuse_large(path, recipe, on_gpu)
    data = recipe.model_dump(mode="json")
    changes: list[str] = []

    def change(key: str, value: Any, *, also_if_given: bool = False) -> None:
        *parents, last = key.split(".")
        block = data
        for parent in parents:
            block = block[parent]
        if block.get(last) != value and (also_if_given or not any(_covers(name, key) for name in given)):
            changes.append(f"{key}: {block.get(last)} -> {value}")
            block[last] = value

    change("max_duration", f"{steps}ba", also_if_given=True)
    change("save_folder", "runs/{run_name}/checkpoints", also_if_given=True)
    change("autoresume", None, also_if_given=True)
    change("save_overwrite", False, also_if_given=True)
    change("save_weights_only", False, also_if_given=True)
    change("loggers", None, also_if_given=True)
    change("profiler", None)
    change("train_subset_num_batches", max(2, -(-steps * 5 // 8)))
    change("save_interval", f"{max(1, steps // 6)}ba")
    change("console_log_interval", "1ba")
    if data["save_num_checkpoints_to_keep"] == -1:
        change("save_num_checkpoints_to_keep", 3)
    if data["eval_loader"]:
        # The last evaluation comes at the end, and not because of the interval.
        change("eval_interval", f"{next(n for n in range(max(2, steps // 5), steps) if steps % n)}ba")
        if not 0 < data["eval_subset_num_batches"] <= 2:
            change("eval_subset_num_batches", 2)
    if data["icl_tasks"]:
        change("icl_tasks", [])
        change("eval_gauntlet", None)
    if (data["callbacks"] or {}).get("hf_checkpointer"):
        change("callbacks.hf_checkpointer", None)
    for key in ("t_warmup", "t_cooldown", "t_scale"):
        value = data["scheduler"].get(key)
        if value is not None and parse(value).unit != "dur" and parse(value).value > 0:
            change(f"scheduler.{key}", f"{max(1, steps // 6)}ba")
    if on_gpu:
        change("deterministic", True)
    return Subject(
        path.stem,
        _from_here(data, Path.cwd()),
        tuple(changes),
        steps,
        tuple(_dropouts(data)),
        _elastic_problem(data),
        on_gpu,
    )


def without_dropout(data: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The same recipe with these dropouts at 0."""
    changed = {**data, "model": {key: dict(v) if isinstance(v, dict) else v for key, v in data["model"].items()}}
    for key in keys:
        *parents, last = key.split(".")
        block = changed
        for parent in parents:
            block = block[parent]
        block[last] = 0.0
    return changed


def _refuse_large(path: Path, recipe: Recipe, on_gpu: bool) -> None:
    if on_gpu or not isinstance(recipe.model, MPTConfig) or (size := n_params(recipe.model)) <= MOST_ON_CPU:
        return
    kind = next((kind for kind in ("instruct", "chat", "storywriter") if kind in path.stem), "")
    twin = f"mpt-tiny-{kind}.yaml" if kind else "mpt-tiny.yaml"
    raise UserError(
        f"{path}: {size:,} parameters are too many to be trained again and again on this machine's CPU. Certify its "
        f"twin, which takes the same way through the code ({path.parent / twin}), or go where each rank has a GPU."
    )


def _covers(given: str, key: str) -> bool:
    return given == key or key.startswith(f"{given}.")


def _from_here(value: Any, cwd: Path) -> Any:
    """Paths that lead out of the working directory, from anywhere (all others are reached through links)."""
    if isinstance(value, dict):
        return {key: _from_here(item, cwd) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_here(item, cwd) for item in value]
    return os.path.normpath(cwd / value) if isinstance(value, str) and value.startswith("../") else value


def _dropouts(data: dict[str, Any]) -> list[str]:
    found = []
    for key in ("resid_pdrop", "emb_pdrop", "attn_config.attn_pdrop", "peft_config.lora_dropout"):
        block: Any = data["model"]
        for part in key.split("."):
            block = block.get(part) if isinstance(block, dict) else None
        if block:
            found.append(f"model.{key}")
    return found


def _elastic_problem(data: dict[str, Any]) -> str | None:
    dataset = data["train_loader"]["dataset"]
    if dataset.get("streaming"):
        return "train_loader.dataset.streaming: true deals its windows out to the ranks"
    if dataset.get("batching_method") == "device_per_stream":
        return "train_loader.dataset.batching_method: device_per_stream gives each rank a stream of its own"
    return None
