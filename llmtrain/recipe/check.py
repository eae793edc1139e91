"""`llmtrain check`: what a recipe means, without starting anything. Light."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel

from llmtrain.config.durations import parse
from llmtrain.hf_model.config import HFConfig
from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import flops_per_token, n_params
from llmtrain.recipe.batch import batch_plan
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe
from llmtrain.redaction import redact, without_password
from llmtrain.trust import FLAG, needed


def check(path: str | Path, overrides: Sequence[str] = (), *, last_mile: bool = False) -> str:
    """The resolved recipe as YAML, below a summary in comments; the text is itself a valid recipe.

    Args:
        path: The recipe.
        overrides: `key=value`.
        last_mile: Try the end of the run, too: save, export and open tiny weights of its shape. Imports torch.

    Raises:
        ConfigError: With every mistake that was found.
        UserError: The last mile fails.
    """
    recipe = load_recipe(path, overrides)
    lines = [f"# {line}" for line in (f"{path}: valid.", *summary(recipe), *trust_lines(recipe))]
    if last_mile:
        from llmtrain.training.last_mile import last_mile as tried

        lines += [f"# {part}" for line in tried(recipe) for part in line.splitlines()]
    return "\n".join(lines) + "\n" + resolved_yaml(recipe)


def trust_lines(recipe: BaseModel) -> list[str]:
    """What of a recipe runs with `--trust-code` only."""
    return [f"needs {FLAG}: {line}" for line in needed(recipe.model_dump(mode="json"))]


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, secrets masked."""
    return yaml.safe_dump(redact(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=120)


def summary(recipe: Recipe) -> list[str]:
    """Size and length of the run, and what is said about its keys before it starts."""
    length = recipe.train_loader.dataset.max_seq_len
    tokens_per_step = recipe.global_train_batch_size * length
    size, per_token = _size(recipe.model, length)
    lines = [
        f"model       {size}",
        f"step        {recipe.global_train_batch_size:,} x {length:,} = {tokens_per_step:,} tokens",
    ]
    steps = _steps(recipe, tokens_per_step)
    if steps is None:
        lines.append(f"run         {recipe.max_duration}: the number of steps depends on the data")
    else:
        total = steps * tokens_per_step
        work = f", {total * per_token:.3g} FLOPs" if per_token is not None else ""
        lines.append(f"run         {steps:,} steps, {total:,} tokens{work}")
    saved = without_password(recipe.save_folder.replace("{run_name}", recipe.run_name)) if recipe.save_folder else None
    lines.append(f"checkpoints {saved or 'none are saved (no save_folder)'}")
    if saved:
        lines[-1] += f", every {recipe.save_interval}; " + ("resumes" if recipe.resumes else "does not resume")
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdigit():
        plan = batch_plan(recipe, int(world_size))
        lines += [
            f"ranks       {world_size}: {plan.accumulation_steps} x {plan.microbatch_size} samples each",
            *plan.notes,
        ]
    if recipe.fsdp_config is not None:
        lines += [f"note: {note}" for note in recipe.fsdp_config.notes()]
    lines += [f"note: {note}" for note in _accepted_without_effect(recipe)]
    return lines


def _size(model: MPTConfig | HFConfig, length: int) -> tuple[str, float | None]:
    """A line about the model, and the FLOPs to train on a token where the recipe alone tells them."""
    if isinstance(model, MPTConfig):
        per_token = flops_per_token(model, length)
        return f"{n_params(model):,} parameters, {per_token / 1e9:,.3g} GFLOPs to train on a token", per_token
    weights = "pretrained" if model.pretrained else "new weights"
    how = f"LoRA of rank {model.peft_config.r}, the rest frozen" if model.peft_config else "all of it trained"
    return f"{model.pretrained_model_name_or_path} ({weights}), {how}", None


def _steps(recipe: Recipe, tokens_per_step: int) -> int | None:
    duration = parse(recipe.max_duration)
    whole = {"ba": 1, "sp": recipe.global_train_batch_size, "tok": tokens_per_step}.get(duration.unit)
    return None if whole is None else -(-int(duration.value) // whole)


def _accepted_without_effect(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.save_filename is not None:
        notes.append("save_filename has no effect: checkpoints are named ep{epoch}-ba{batch}.")
    if recipe.save_latest_filename is not None:
        notes.append("save_latest_filename has no effect: the link is named `latest`.")
    return notes
