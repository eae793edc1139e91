"""Where a run starts: from scratch, from given weights, or from its own newest complete checkpoint.

Composer's autoresume follows a `latest` link: when that dangles, the run silently starts at step 0; when the newest
checkpoint is torn it fails without trying the one before; a finished run ends with an error.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Time, TimeUnit
from composer.utils import dist

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.resolve import checkpoints_in, locate, newest_complete
from llmtrain.errors import UserError
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.environment import say


@dataclass(frozen=True)
class StartingPoint:
    """What is loaded before the first step.

    Attributes:
        load_path: checkpoint folder or file; None starts from scratch.
        load_weights_only: take the model's weights and nothing else.
        load_ignore_keys: glob patterns of state keys that stay as they are.
        step: optimizer steps that are already done.
        finished: the run has reached its max_duration before.
    """

    load_path: str | None = None
    load_weights_only: bool = False
    load_ignore_keys: list[str] | None = None
    step: int = 0
    finished: bool = False


def save_folder(recipe: Recipe) -> Path | None:
    """The folder of the run's checkpoints, with `{run_name}` filled in."""
    if recipe.save_folder is None:
        return None
    if "://" in recipe.save_folder:
        raise UserError(
            f"save_folder: {recipe.save_folder!r}: checkpoints to object stores are not supported yet. "
            "Give a folder that all nodes share, and copy finished checkpoints from there."
        )
    return Path(recipe.save_folder.replace("{run_name}", recipe.run_name))


def find(recipe: Recipe) -> StartingPoint:
    """Decides where the run starts; rank 0 looks at the disk, all ranks get its answer.

    Raises:
        UserError: all checkpoints of the run are damaged; there are checkpoints but `autoresume` is off; the model's
            shape is not the one of the checkpoint; `load_path` is not there.
    """
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = _find(recipe)
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    point: StartingPoint = answer[0]
    return point


def _find(recipe: Recipe) -> StartingPoint:
    folder = save_folder(recipe)
    existing = checkpoints_in(folder) if folder is not None and folder.is_dir() else []
    if folder is not None and existing:
        if recipe.resumes:
            return _from_own_checkpoint(recipe, folder)
        if not recipe.save_overwrite:
            raise UserError(
                f"{folder} holds checkpoints of an earlier run (newest: {existing[0].path.name}); autoresume is off. "
                "Set autoresume=true to continue, save_overwrite=true to delete them and start over, or another "
                "run_name."
            )
        for old in existing:
            shutil.rmtree(old.path)
        (folder / "latest").unlink(missing_ok=True)
        say(f"save_overwrite: deleted {len(existing)} checkpoints in {folder}.")
    if recipe.load_path is None:
        return StartingPoint()
    if "://" in recipe.load_path:
        path = recipe.load_path
    else:
        path = str(locate(Path(recipe.load_path), say))
    return StartingPoint(path, recipe.load_weights_only, recipe.load_ignore_keys)


def _from_own_checkpoint(recipe: Recipe, folder: Path) -> StartingPoint:
    newest = newest_complete(folder, say)
    if newest is None:
        raise UserError(
            f"{folder} holds checkpoints, but none is complete (see above). Nothing was changed. "
            "Restore one from a copy, or start over with autoresume=false save_overwrite=true."
        )
    saved = manifest.read(newest)
    compare(saved.recipe, recipe.model_dump(mode="json"), newest)
    if saved.versions.get("torch", "").split("+")[0].rsplit(".", 1)[0] != _torch_minor():
        say(
            f"warning: {newest.name} was written with torch {saved.versions.get('torch')}, not {torch.__version__}: "
            "the run continues, but not with the same bits (and checkpoints of torch 2.7 may not load)."
        )
    path = str(newest / "full.pt") if saved.kind == "full" else str(newest)
    return StartingPoint(path, step=saved.step, finished=_finished(recipe, saved, newest))


def compare(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Says which keys differ between the checkpoint's recipe and this one.

    Raises:
        UserError: the model has another shape, so that the weights cannot be loaded.
    """
    shape = ("d_model", "n_heads", "n_layers", "vocab_size", "expansion_ratio", "tie_word_embeddings", "no_bias")
    old_model, new_model = saved.get("model") or {}, now.get("model") or {}
    changed = [
        f"{key} {old_model.get(key)} -> {new_model.get(key)}"
        for key in shape
        if old_model.get(key) != new_model.get(key)
    ]
    if changed:
        raise UserError(
            f"the model is not the one of {checkpoint}: {', '.join(changed)}. "
            "Change the recipe back, or choose another run_name to start a new run."
        )
    for key in ("model", "optimizer", "scheduler", "global_train_batch_size", "max_duration", "train_loader", "seed"):
        if saved.get(key) != now.get(key):
            note = " (the learning-rate schedule changes with it)" if key == "max_duration" else ""
            change = _difference(saved.get(key), now.get(key))
            say(f"warning: `{key}` differs from the recipe of {checkpoint.name}{note}: {change}")


def _difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [
            _difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        return ", ".join(parts)
    return f"{path + ' ' if path else ''}{old} -> {new}"


def _finished(recipe: Recipe, saved: manifest.Manifest, checkpoint: Path) -> bool:
    end = Time.from_input(recipe.max_duration, TimeUnit.EPOCH)
    epochs = int(match[1]) if (match := re.match(r"ep(\d+)-", checkpoint.name)) else 0
    done = {
        TimeUnit.BATCH: saved.step,
        TimeUnit.TOKEN: saved.tokens,
        TimeUnit.EPOCH: epochs,
        TimeUnit.SAMPLE: saved.step * recipe.global_train_batch_size,
    }
    return end.unit in done and done[end.unit] >= end.value


def _torch_minor() -> str:
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])
