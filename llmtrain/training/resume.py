"""Where a run starts: from scratch, from given weights, or from its own newest complete checkpoint.

Composer's autoresume follows a `latest` link: when that dangles, the run silently starts at step 0; when the newest
checkpoint is torn it fails without trying the one before; a finished run ends with an error.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from composer import Time, TimeUnit
from composer.utils import dist

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.pretrained import fetch
from llmtrain.checkpoint.resolve import CheckpointInfo, checkpoints_in, first_intact, locate
from llmtrain.checkpoint.validation import validate
from llmtrain.errors import UserError
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.agreement import from_all_ranks, from_rank_zero
from llmtrain.training.environment import say, say_each
from llmtrain.training.recipe_changes import check_model, check_run, vocabulary_grows

Kind = Literal["sharded", "full"]


@dataclass(frozen=True)
class StartingPoint:
    """What is loaded before the first step.

    Attributes:
        load_path: what Composer loads: a checkpoint folder, a file or a URI; None for nothing.
        load_weights_only: take the model's weights from it and nothing else.
        load_ignore_keys: glob patterns of state keys that stay as they are.
        weights: what to start from, where that is no checkpoint that Composer would load: weights go into the model
            before it is sharded.
        step: optimizer steps that are already done.
        finished: the run has reached its max_duration before.
        refused: names of the run's checkpoints that were found damaged.
        replaces: checkpoints of an earlier run that go away with the first new one (save_overwrite).
    """

    load_path: str | None = None
    load_weights_only: bool = False
    load_ignore_keys: list[str] | None = None
    weights: Path | None = None
    step: int = 0
    finished: bool = False
    refused: frozenset[str] = frozenset()
    replaces: tuple[Path, ...] = ()


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
    """Decides where the run starts; the same answer on all ranks (a collective call).

    Raises:
        UserError: all checkpoints of the run are damaged; there are checkpoints but `autoresume` is off; model or
            optimizer are not those of the checkpoint; `load_path` is not there or cannot be loaded by this recipe.
    """
    folder = save_folder(recipe)
    own = from_rank_zero(lambda: _own_checkpoints(folder))
    if own and folder is not None:
        if not recipe.save_overwrite:
            return _continue(recipe, folder, own)
        if recipe.load_path is not None and Path(recipe.load_path).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"load_path {recipe.load_path} lies in save_folder, whose checkpoints save_overwrite=true replaces. "
                "Choose another run_name."
            )
        say(f"save_overwrite: starting anew; {len(own)} checkpoints in {folder} go when the first new one is written.")
    replaces = tuple(info.path for info in own)
    pretrained = recipe.model.pretrained
    if isinstance(pretrained, str):
        return StartingPoint(weights=from_rank_zero(lambda: fetch(pretrained)), replaces=replaces)
    if recipe.load_path is None:
        return StartingPoint(replaces=replaces)
    return dataclasses.replace(_load_path(recipe, recipe.load_path), replaces=replaces)


def _own_checkpoints(folder: Path | None) -> list[CheckpointInfo]:
    """The checkpoints in the run's folder, newest first; refuses to start beside another trainer's."""
    if folder is None or not folder.is_dir():
        return []
    found = checkpoints_in(folder)
    if not found and (foreign := sorted(folder.glob("*rank*.pt"))):
        raise UserError(
            f"{folder} holds another trainer's checkpoints ({foreign[-1].name}). To start from one, give it as "
            "load_path and choose another save_folder or run_name."
        )
    return found


def _continue(recipe: Recipe, folder: Path, own: list[CheckpointInfo]) -> StartingPoint:
    newest, refused = first_intact(own, verify_together, say)
    if newest is None:
        raise UserError(
            f"{folder} holds checkpoints, but none is complete (see above). Nothing was changed. "
            "Restore one from a copy, or start over with autoresume=false save_overwrite=true."
        )
    saved = manifest.read(newest.path)
    finished = _finished(recipe, saved, newest)
    if not finished and not recipe.resumes:
        state = "weights only, so it cannot be continued" if saved.weights_only else "autoresume is off"
        proceed = "" if saved.weights_only else "autoresume=true to continue, "
        raise UserError(
            f"{folder} holds checkpoints of an earlier run (newest: {newest.path.name}; {state}). "
            f"Set {proceed}save_overwrite=true to start over and replace them, or another run_name."
        )
    if not finished and saved.weights_only:
        raise UserError(
            f"{newest.path} holds weights only, so the run cannot be continued. Start a new one with another run_name "
            f"and load_path={newest.path} load_weights_only=true."
        )
    say_each(from_rank_zero(lambda: check_run(saved.recipe, recipe.model_dump(mode="json"), newest.path)))
    _say_versions(saved, newest.path)
    if not finished and saved.kind != _kind_that_is_read(recipe):
        raise UserError(_wrong_kind(newest.path, saved.kind))
    return StartingPoint(
        str(_for_composer(newest.path, saved.kind)), step=saved.step, finished=finished, refused=frozenset(refused)
    )


def _load_path(recipe: Recipe, given: str) -> StartingPoint:
    options = (recipe.load_weights_only, recipe.load_ignore_keys)
    if "://" in given:
        return StartingPoint(given, *options)
    path = from_rank_zero(lambda: locate(Path(given), say))
    kind: Kind = "sharded" if (path / ".metadata").is_file() else "full"
    grows = False
    if (path / manifest.MANIFEST).is_file():
        if problems := verify_together(path):
            raise UserError(f"load_path: {path} is damaged: {problems[0]}")
        saved = manifest.read(path)
        check_model(saved.recipe, recipe.model_dump(mode="json"), path, weights_only=recipe.load_weights_only)
        grows = recipe.load_weights_only and vocabulary_grows(saved.recipe, recipe.model_dump(mode="json"))
        if saved.weights_only and not recipe.load_weights_only:
            raise UserError(f"load_path: {path} holds weights only. Set load_weights_only=true.")
    if kind == _kind_that_is_read(recipe) and not grows:
        return StartingPoint(str(_for_composer(path, kind)), *options)
    if not recipe.load_weights_only:
        raise UserError(f"load_path: {_wrong_kind(path, kind)} Or take the weights alone: load_weights_only=true.")
    if recipe.model.init_device == "meta":
        raise UserError(f"load_path: to take the weights of {path}, set model.init_device=mixed.")
    return StartingPoint(weights=path)


def verify_together(checkpoint: Path) -> list[str]:
    """Compares a checkpoint with its manifest: sizes on rank 0, then hashes, each rank its share of the files.

    A rank takes the files that it will read itself where the number of ranks is the same; they are not hashed again
    when they are loaded.
    """
    problems = from_rank_zero(lambda: manifest.verify_sizes(checkpoint))
    if problems:
        return problems
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    mine = [name for name in manifest.read(checkpoint).files if _owner(name) % ranks == rank]

    def hashes() -> list[str]:
        return [problem for name in mine if (problem := _hash_problem(checkpoint, name))]

    return [problem for found in from_all_ranks(hashes) for problem in found]


def _hash_problem(checkpoint: Path, name: str) -> str | None:
    return None if validate(checkpoint / name) else manifest.verify_file(checkpoint, name) or f"{name}: unreadable"


def _owner(name: str) -> int:
    """The rank that wrote a file: `__3_0.distcp` is rank 3's, anything else rank 0's."""
    first = name.removeprefix("__").split("_")[0]
    return int(first) if name.startswith("__") and first.isdigit() else 0


def _kind_that_is_read(recipe: Recipe) -> Kind:
    fsdp = recipe.fsdp_config
    return "sharded" if fsdp and fsdp.sharding_strategy != "NO_SHARD" and fsdp.state_dict_type == "sharded" else "full"


def _for_composer(checkpoint: Path, kind: Kind) -> Path:
    return checkpoint / "full.pt" if kind == "full" and checkpoint.is_dir() else checkpoint


def _wrong_kind(checkpoint: Path, kind: Kind) -> str:
    if kind == "sharded":
        return (
            f"{checkpoint} is a sharded checkpoint, and this recipe reads full ones. "
            "Set fsdp_config.state_dict_type=sharded (with a sharding_strategy other than NO_SHARD)."
        )
    return (
        f"{checkpoint} is a full checkpoint, and this recipe reads sharded ones. "
        "Set fsdp_config.state_dict_type=full fsdp_config.load_monolith_rank0_only=true."
    )


def _say_versions(saved: manifest.Manifest, checkpoint: Path) -> None:
    before, now = saved.versions.get("torch", "unknown"), torch.__version__
    if before.split("+")[0].split(".")[:2] != now.split("+")[0].split(".")[:2]:
        say(
            f"warning: {checkpoint.name} was written with torch {before}, this is {now}: the run continues, but not "
            "with the same bits (and checkpoints of torch 2.7 may not load)."
        )


def _finished(recipe: Recipe, saved: manifest.Manifest, checkpoint: CheckpointInfo) -> bool:
    end = Time.from_input(recipe.max_duration, TimeUnit.EPOCH)
    done = {
        TimeUnit.BATCH: saved.step,
        TimeUnit.TOKEN: saved.tokens,
        TimeUnit.EPOCH: checkpoint.epoch,
        TimeUnit.SAMPLE: saved.step * recipe.global_train_batch_size,
    }
    return end.unit in done and done[end.unit] >= end.value
