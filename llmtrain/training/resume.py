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
from llmtrain.checkpoint.remote import RemoteFolder
from llmtrain.checkpoint.resolve import CHECKPOINTS, CheckpointInfo, checkpoints_in, first_usable, locate
from llmtrain.checkpoint.validation import validate
from llmtrain.errors import UserError
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.agreement import from_all_ranks_in_turns, from_rank_zero
from llmtrain.training.environment import say, say_each
from llmtrain.training.recipe_changes import check_model, check_run, vocabulary_grows
from llmtrain.training.remote_start import (
    RemoteInfo,
    fetch_best,
    fetch_load_path,
    fetch_skipped_steps,
    fetch_together,
    look,
    remote_folder,
)

Kind = Literal["sharded", "full"]

_TURN = 0.5
"""Seconds between the collective calls in which ranks wait for each other."""


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
        epoch: epochs that are already done.
        finished: the run has reached its max_duration before.
        refused: names of the run's checkpoints that were found damaged.
        replaces: checkpoints of an earlier run that go away with the first new one (save_overwrite).
        remote_refused: names of checkpoints in the store that were found damaged there.
        remote_replaces: names of those of an earlier run in the store.
    """

    load_path: str | None = None
    load_weights_only: bool = False
    load_ignore_keys: list[str] | None = None
    weights: Path | None = None
    step: int = 0
    epoch: int = 0
    finished: bool = False
    refused: frozenset[str] = frozenset()
    replaces: tuple[Path, ...] = ()
    remote_refused: frozenset[str] = frozenset()
    remote_replaces: frozenset[str] = frozenset()


def save_folder(recipe: Recipe) -> Path | None:
    """The folder of the run's checkpoints on this machine, with `{run_name}` filled in.

    Where the recipe names a store, checkpoints are written to the run's own folder, and sent from there.
    """
    if recipe.save_folder is None:
        return None
    if "://" in recipe.save_folder:
        return Path("runs") / recipe.run_name / CHECKPOINTS
    return Path(recipe.save_folder.replace("{run_name}", recipe.run_name))


def find(recipe: Recipe) -> StartingPoint:
    """Decides where the run starts; the same answer on all ranks (a collective call).

    Raises:
        UserError: all checkpoints of the run are damaged; there are checkpoints but `autoresume` is off; model or
            optimizer are not those of the checkpoint; `load_path` is not there or cannot be loaded by this recipe.
    """
    folder, remote = save_folder(recipe), remote_folder(recipe)
    own = from_rank_zero(lambda: _own_checkpoints(folder))
    there: list[RemoteInfo] = []
    if remote is not None and folder is not None:
        there = look(remote, folder, must=not own or recipe.save_overwrite) or []
    if (own or there) and folder is not None:
        if not recipe.save_overwrite:
            return _continue(recipe, folder, own, remote, there)
        if recipe.load_path is not None and Path(recipe.load_path).resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"load_path {recipe.load_path} lies in save_folder, whose checkpoints save_overwrite=true replaces. "
                "Choose another run_name."
            )
        if own:
            say(
                f"save_overwrite: starting anew; {len(own)} checkpoints in {folder} go when the first new one is "
                "written."
            )
        if there:
            say(f"save_overwrite: {len(there)} checkpoints in {remote} go when the first new one has arrived there.")
    start = StartingPoint(
        replaces=tuple(info.path for info in own),
        remote_replaces=frozenset(info.path.name for info in there),
    )
    pretrained = recipe.model.pretrained
    if isinstance(pretrained, str):
        return dataclasses.replace(start, weights=from_rank_zero(lambda: fetch(pretrained)))
    if recipe.load_path is None:
        return start
    given = _load_path(recipe, recipe.load_path)
    return dataclasses.replace(given, replaces=start.replaces, remote_replaces=start.remote_replaces)


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


def _continue(
    recipe: Recipe, folder: Path, own: list[CheckpointInfo], remote: RemoteFolder | None, there: list[RemoteInfo]
) -> StartingPoint:
    newest, refused, remote_refused = _newest(folder, own, remote, there)
    if newest is None:
        holds = f"{folder} holds" if own else f"{remote} holds"
        raise UserError(
            f"{holds} checkpoints, but none is complete (see above). Nothing was changed. "
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
    if remote is not None and isinstance(newest, RemoteInfo):
        fetch_skipped_steps(remote, folder.parent)
    if remote is not None and recipe.best_checkpoint is not None:
        fetch_best(remote, there, folder, saved.step)
    return StartingPoint(
        str(_for_composer(newest.path, saved.kind)),
        step=saved.step,
        epoch=newest.epoch,
        finished=finished,
        refused=frozenset(refused),
        remote_refused=frozenset(remote_refused),
    )


def _newest(
    folder: Path, own: list[CheckpointInfo], remote: RemoteFolder | None, there: list[RemoteInfo]
) -> tuple[CheckpointInfo | None, set[str], set[str]]:
    """The newest sound checkpoint, on this machine when it returns; and who was refused before it, here and there.

    Of the same step, the one on this machine comes first.
    """
    remote_refused = {info.path.name for info in there if info.problem is not None}

    def problems_of(info: CheckpointInfo) -> list[str]:
        if not isinstance(info, RemoteInfo):
            return verify_together(info.path)
        assert remote is not None
        problems = fetch_together(remote, info.there, folder)
        if problems:
            remote_refused.add(info.path.name)
        return [f"in {remote}: {problem}" for problem in problems]

    candidates = sorted([*own, *there], key=lambda info: (info.step, info.epoch), reverse=True)  # stable
    newest, refused = first_usable(candidates, problems_of, say)
    names = set(refused) & {info.path.name for info in own}
    if newest is not None:
        names.discard(newest.path.name)  # a sound one of that name has come from the store
    return newest, names, remote_refused


def _load_path(recipe: Recipe, given: str) -> StartingPoint:
    options = (recipe.load_weights_only, recipe.load_ignore_keys)
    fetched = fetch_load_path(given) if "://" in given else None
    if "://" in given and fetched is None:
        return StartingPoint(given, *options)
    path = fetched or from_rank_zero(lambda: locate(Path(given), say))
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

    def hashes() -> list[str]:
        mine = [name for name in manifest.read(checkpoint).files if _owner(name) % ranks == rank]
        return [problem for name in mine if (problem := _hash_problem(checkpoint, name))]

    # In turns: one rank may have all to read, for longer than a collective call may take.
    return [problem for found in from_all_ranks_in_turns(hashes, _TURN) for problem in found]


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
