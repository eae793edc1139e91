"""What `llmtrain eval` is pointed at, opened: a model, and the text that it is evaluated on."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llmtrain.checkpoint.read import recipe_of
from llmtrain.checkpoint.resolve import locate, run_folder
from llmtrain.data.config import TextDatasetConfig, TextLoaderConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.tokens import JoinedTokens, ShardTokens, folder_of_shards
from llmtrain.generation.load import load
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.recipe.load import load_recipe
from llmtrain.recipe.recipe import Recipe
from llmtrain.tokenizer import fingerprint, fingerprint_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPES = (".yaml", ".yml")
_HAVE_AN_EFFECT = ("eval_loader", "max_seq_len", "run_name", "variables")


@dataclass(frozen=True)
class Place:
    """Where a model lies, and what its run was told."""

    weights: Path
    """A run, a checkpoint, a `.pt` file or an export."""
    name: str
    """For titles: run and checkpoint, or the folder's name."""
    results: Path
    """Folder and stem of the files with results."""
    recipe: Recipe | None
    """None when nothing says."""


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
        return Place(source, f"{beside.name}/{source.name}" if inside_a_run else source.name, stem, known)
    checkpoint = locate(source)
    run = run_folder(checkpoint)
    stem = (run or Path()) / "eval" / checkpoint.name.removesuffix(".pt")
    name = f"{run.name}/{checkpoint.name}" if run is not None else checkpoint.name
    return Place(source, name, stem, known or _recipe(checkpoint, run, recipe, overrides))


def open_model(
    place: Place, recipe: Path | None, device: str | None, dtype: str | None
) -> "tuple[MPT | HFCausalLM, PreTrainedTokenizerFast]":
    """The model in evaluation mode, and its tokenizer."""
    return load(place.weights, recipe=recipe, device=device, dtype=dtype)


def open_data(
    place: Place, folders: Sequence[Path], vocab_size: int, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[JoinedTokens, list[ShardTokens]]:
    """The folders that were given, or the recipe's evaluation data.

    Raises:
        UserError: there is neither, or it does not fit the model.
    """
    known = [fingerprint_of(tokenizer)]
    if place.recipe is not None:
        with suppress(UserError):  # it may not be here any more; the run's own is
            known.append(fingerprint(place.recipe.tokenizer.name))  # without the tokens that the run added
    named: dict[str, TextDatasetConfig] = {f"--data {folder}": folder_of_shards(folder) for folder in folders}
    if not named:
        named = _evaluation_data(place)
    parts = [ShardTokens(cfg, vocab_size=vocab_size, fingerprints=known, key=key) for key, cfg in named.items()]
    return JoinedTokens(parts), parts


def _evaluation_data(place: Place) -> dict[str, TextDatasetConfig]:
    if place.recipe is None:
        raise UserError(f"{place.weights}: no recipe says what it is evaluated on. Give shards: --data FOLDER")
    loaders = place.recipe.eval_loader
    text = [loader for loader in loaders if isinstance(loader, TextLoaderConfig)]
    if not text:
        what = "reads conversations" if loaders else "is missing"
        raise UserError(
            f"{place.name}: its recipe's eval_loader {what}, and this evaluates on plain text. Give shards of tokens: "
            "--data FOLDER"
        )
    if len(text) < len(loaders):
        raise UserError(f"{place.name}: some of its evaluation loaders read conversations. Choose: --data FOLDER")
    return {f"eval_loader {loader.label}" if loader.label else "eval_loader": loader.dataset for loader in text}


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
