"""What `llmtrain eval` is pointed at: where a model lies, and what its run was told."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmtrain.checkpoint.fetch import fetch, is_uri
from llmtrain.checkpoint.read import recipe_of
from llmtrain.checkpoint.resolve import locate, run_folder
from llmtrain.errors import UserError
from llmtrain.evaluation.config import ModelToEvaluate
from llmtrain.hf_model.config import HFConfig
from llmtrain.model.config import MPTConfig
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import FinetuningEvalLoader, ModelConfig, Recipe, TextEvalLoader
from llmtrain.tokenizer import TokenizerConfig, fingerprint, fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPES = (".yaml", ".yml")
_HAVE_AN_EFFECT = ("eval_loader", "max_seq_len", "run_name", "variables")


@dataclass(frozen=True)
class Place:
    """Where a model lies, and what its run was told."""

    weights: Path | None
    """A run, a checkpoint, a `.pt` file or an export; None where `model` names its weights itself."""
    name: str
    """For titles: run and checkpoint, or the folder's name."""
    results: Path
    """Folder and stem of the files with results."""
    recipe: Recipe | None = None
    """Of its training; None when nothing says."""
    recipe_file: Path | None = None
    """A training recipe that was given for weights that carry none."""
    model: ModelConfig | None = None
    """What an evaluation recipe says of the model."""
    tokenizer: TokenizerConfig | None = None
    """What it says of the tokenizer."""


def find(source: Path, recipe: Path | None = None, overrides: Sequence[str] = ()) -> Place:
    """Find what is meant by a run, a checkpoint, a `.pt` file, an export, or a training recipe (the run it names).

    Args:
        source: one of those.
        recipe: the YAML file, for a checkpoint that carries none.
        overrides: `key=value` of the recipe.

    Raises:
        UserError: there is no such thing, or an override that could have no effect.
    """
    for override in overrides:
        key = override.partition("=")[0].partition(".")[0].lstrip("+~")
        if key not in _HAVE_AN_EFFECT:
            raise UserError(
                f"{override}: has no effect on an evaluation; the model is the checkpoint's. "
                f"Keys that have: {', '.join(_HAVE_AN_EFFECT)}"
            )
    if source.suffix in RECIPES:
        known = load_recipe(source, overrides)
        source = _weights_of(known, source)
    elif not source.exists():
        raise UserError(f"{source}: no such file or folder. Give a run, a checkpoint, an export or a recipe")
    else:
        known = None
    if source.is_dir() and (source / "config.json").is_file():
        if known is None and recipe is not None:
            known = load_recipe(recipe, overrides)
        beside = source.resolve().parent
        inside_a_run = (beside / "recipe.yaml").is_file()
        stem = beside / "eval" / source.name if inside_a_run else Path("eval") / source.name
        if known is None and inside_a_run:
            known = load_recipe(beside / "recipe.yaml", overrides)
        name = f"{beside.name}/{source.name}" if inside_a_run else source.resolve().name
        return Place(source, name, stem, known, recipe)
    checkpoint = locate(source)
    run = run_folder(checkpoint)
    stem = (run or Path()) / "eval" / checkpoint.name.removesuffix(".pt")
    name = f"{run.name}/{checkpoint.name}" if run is not None else checkpoint.name
    return Place(source, name, stem, known or _recipe(checkpoint, run, recipe, overrides))


def of_recipe(model: ModelToEvaluate, key: str) -> Place:
    """Find one of an evaluation recipe's models; a hub name or a folder in an object store is downloaded.

    Args:
        model: what the recipe says.
        key: of it, for messages.

    Raises:
        UserError: there is no such thing.
    """
    block = model.model
    named = model.load_path or (block.pretrained if isinstance(block, MPTConfig) else None)
    if named is None:
        assert isinstance(block, HFConfig)  # validated: something names the weights
        place = Place(None, name := block.pretrained_model_name_or_path, Path("eval") / Path(name).name)
    else:
        place = find(_fetched(named, key))
    return replace(place, name=model.model_name or place.name, model=block, tokenizer=model.tokenizer)


def _fetched(named: str, key: str) -> Path:
    """The local path of what a recipe names; a name on the hub or a URI is downloaded."""
    here = Path(named).expanduser()
    if here.exists():
        return here
    if not is_uri(named) and Path(named).parts[0] in (".", "..", "~", "/", "runs"):  # no owner on a hub
        raise UserError(f"{key}.load_path: {named}: no such file or folder (from {Path.cwd()})")
    try:
        return fetch(named)
    except UserError as problem:
        raise UserError(str(problem).replace("model.pretrained:", f"{key}.load_path:", 1)) from problem


def evaluation_data(place: Place) -> list[TextEvalLoader | FinetuningEvalLoader]:
    """The evaluation loaders of the recipe that a model was trained with.

    Raises:
        UserError: nothing says which they are.
    """
    if place.recipe is None:
        raise UserError(
            f"{place.weights}: no recipe says what it is evaluated on. Give shards or text: --data PATH, or tasks: "
            "--tasks NAME"
        )
    if not place.recipe.eval_loader:
        raise UserError(
            f"{place.name}: its recipe's eval_loader is missing. Give shards or text: --data PATH, or tasks: --tasks "
            "NAME"
        )
    return list(place.recipe.eval_loader)


def known_tokenizers(place: Place, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Fingerprints of tokenizers whose ids a model knows: its own, and its recipe's without what the run added."""
    known = [fingerprint_of(tokenizer)]
    if place.recipe is not None:
        with suppress(UserError):  # it may not be here any more; the run's own is
            known.append(fingerprint(place.recipe.tokenizer.name))
    return known


def _weights_of(recipe: Recipe, file: Path) -> Path:
    run = Path("runs") / recipe.run_name
    if run.is_dir():
        return run
    pretrained = getattr(recipe.model, "pretrained", None)
    start = recipe.load_path or (pretrained if isinstance(pretrained, str) else None)
    if start is not None and Path(start).exists():
        return Path(start)
    raise UserError(f"{file}: there is no {run} yet, and no weights that it would start from. Train it first")


def _recipe(checkpoint: Path, run: Path | None, given: Path | None, overrides: Sequence[str]) -> Recipe | None:
    file = given or (run / "recipe.yaml" if run is not None else None)
    if file is not None and file.is_file():
        if given is None and any(override.startswith("variables") for override in overrides):
            raise UserError(f"variables: {file} is resolved and uses none; override eval_loader.dataset.local=...")
        return load_recipe(file, overrides)
    data = recipe_of(checkpoint)
    if overrides:
        raise UserError(f"{checkpoint}: no recipe.yaml beside it that {overrides[0]} could change. Pass --recipe")
    try:
        return None if data is None else Recipe.model_validate(data)
    except ValidationError:
        return None  # of another trainer: the model is read, its data is not known
