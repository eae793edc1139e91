"""The end of a run at its beginning: save, export, open, generate, with tiny random weights of the recipe's shape."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from llmtrain.checkpoint.export import export
from llmtrain.checkpoint.layouts import choose_layout
from llmtrain.checkpoint.push import reach
from llmtrain.checkpoint.snapshot import Snapshot, seal
from llmtrain.config.durations import parse
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.model.flops import n_params
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import Recipe
from llmtrain.tokenizer import load_tokenizer, save_tokenizer
from llmtrain.training.callbacks import HFCheckpointerConfig
from llmtrain.training.export_place import KEY, ExportPlace
from llmtrain.training.remote_start import place_of_checkpoints
from llmtrain.training.resume import save_folder

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def last_mile(recipe: Recipe) -> list[str]:
    """All of it, before a run (``llmtrain check RECIPE --last-mile``): the export, the folders, the destinations.

    Returns:
        What was found, a line each.

    Raises:
        UserError: something of it would fail at the end.
    """
    return [*exercise(recipe), *places(recipe), *place_of_checkpoints(recipe), *destinations(recipe)]


def settings_of(recipe: Recipe) -> HFCheckpointerConfig | None:
    """The recipe's hf_checkpointer."""
    return recipe.callbacks.hf_checkpointer if recipe.callbacks is not None else None


def exercise(recipe: Recipe, tokenizer: Path | None = None) -> list[str]:
    """Saves random weights of two small blocks of the recipe's kind, exports them, and has transformers open them.

    Args:
        recipe: the recipe.
        tokenizer: folder of its tokenizer; looked for when left out.

    Raises:
        UserError: it cannot be exported; with the key to set.
    """
    if not isinstance(recipe.model, MPTConfig):
        return ["last mile   hf_causal_lm: exports are transformers' own; only folders and destinations are tried"]
    started, notes = time.monotonic(), []
    settings = settings_of(recipe)
    # Where the recipe exports nothing itself, somebody will, and is told here what it takes.
    dtype, with_code = (settings.precision, settings.with_code) if settings is not None else ("float32", True)
    try:
        layout = choose_layout(recipe.model, with_code=with_code, where="model")
    except UserError as error:
        raise UserError(_explained(str(error))) from None
    model = small_twin(recipe.model)
    with tempfile.TemporaryDirectory(prefix="last-mile-") as name:
        run = Path(name) / "run"
        run.mkdir()
        if tokenizer is not None:
            (run / "tokenizer").symlink_to(tokenizer.absolute())
        else:
            notes += _save_tokenizer(recipe, run / "tokenizer")
        block = {"name": "mpt_causal_lm", **model.model_dump(mode="json")}
        # Nothing is drawn from the run's own random numbers.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(recipe.seed)
            weights = {f"model.{key}": value for key, value in MPT(model, device="cpu").state_dict().items()}
        shapes = {key: (value.shape, value.dtype) for key, value in weights.items()}
        checkpoint = run / "checkpoints" / "ep0-ba0"
        with Snapshot(checkpoint, shapes) as snapshot:
            for key, value in weights.items():
                snapshot.tensors[key].copy_(value)
            seal(checkpoint, step=0, tokens=0, recipe={"model": block})
            try:
                report = export(checkpoint, Path(name) / "export", dtype=dtype, with_code=with_code)
            except UserError as error:
                raise UserError(_explained(str(error).replace(str(checkpoint), "model"))) from None
    # Widths may decide: those of the recipe count, and the twin has tried the save, the tokenizer and the opening.
    how = layout.name
    needs = " Exports need --with-code." if how == "code" and settings is None else ""
    return [
        *notes,
        f"last mile   saved, exported ({how}, {dtype}), opened by transformers, {report.tokens} greedy tokens equal "
        f"({time.monotonic() - started:.1f} s; {model.n_layers} blocks, {model.d_model} wide, random weights)",
        *([f"            {layout.reason}{needs}"] if layout.reason else []),
    ]


def _save_tokenizer(recipe: Recipe, folder: Path) -> list[str]:
    try:
        save_tokenizer(load_tokenizer(recipe.tokenizer), folder)
    except UserError as error:
        return [f"tokenizer   not tried, it cannot be opened here: {str(error).splitlines()[0]}"]
    return []


def _explained(problem: str) -> str:
    """With what to set in a recipe, which has no command line."""
    in_the_recipe = f"\nIn the recipe that is `{KEY}.with_code: true`." if "--with-code" in problem else ""
    return f"The run could not be exported. {problem}{in_the_recipe}"


def small_twin(config: MPTConfig) -> MPTConfig:
    """A model of the same kind in two narrow blocks: heads, positions, norms, windows and vocabulary are as they were.

    Args:
        config: the recipe's.
    """
    d_head = 8 if config.n_heads <= 16 else 4
    d_model = config.n_heads * d_head + bool(config.d_model % config.n_heads)
    own_width = config.head_dim is not None and config.n_heads * config.head_dim != config.d_model
    ratio = config.ffn_hidden_size / config.d_model
    changes = {
        "d_model": d_model,
        "n_layers": 2,
        "head_dim": 2 * d_head if own_width else None,
        "ffn_config": {**config.ffn_config.model_dump(), "ffn_hidden_size": max(8, round(ratio * d_model))},
        "attn_config": {
            **config.attn_config.model_dump(),
            "attn_impl": "auto",
            "softmax_scale": _scale(config, 2 * d_head if own_width else d_head),
        },
        "activation_checkpointing_target": None,
        "init_device": "cpu",
        "pretrained": None,
    }
    return MPTConfig.model_validate({**config.model_dump(), **changes})


def _scale(config: MPTConfig, d_head: int) -> float | None:
    """The softmax's scale for heads of another width: as usual or as unusual as it was."""
    scale = config.attn_config.softmax_scale
    return None if scale is None or scale == config.d_head**-0.5 else scale * (config.d_head / d_head) ** 0.5


def places(recipe: Recipe) -> list[str]:
    """Whether checkpoints and exports can be written where the recipe wants them, and whether there is room.

    Raises:
        UserError: a folder cannot be written.
    """
    found = []
    size = n_params(recipe.model) if isinstance(recipe.model, MPTConfig) else None
    local = save_folder(recipe)
    if local is not None:
        folder = _existing(str(local), "save_folder")
        keep = recipe.save_num_checkpoints_to_keep
        found.append(_room("save_folder", folder, size and size * 12 * ((keep if keep > 0 else 2) + 1), "checkpoints"))
    settings = settings_of(recipe)
    if settings is not None:
        place = _place(recipe, settings)
        folder = _existing(str(place.folder), f"{KEY}.save_folder")
        count = (_exports(recipe, settings) or 1) if place.keep else 1
        need = size and size * _BYTES[settings.precision] * count
        found.append(_room(f"{KEY}.save_folder", folder, need, f"{count} export(s)"))
    return found


def destinations(recipe: Recipe) -> list[str]:
    """Whether exports can be sent where the recipe wants them.

    Raises:
        UserError: they cannot.
    """
    settings = settings_of(recipe)
    return [f"push        {reach(url)}" for url in _place(recipe, settings).push] if settings is not None else []


def _place(recipe: Recipe, settings: HFCheckpointerConfig) -> ExportPlace:
    run = Path("runs") / recipe.run_name
    return ExportPlace.of(settings.save_folder, settings.huggingface_folder_name, settings.push, recipe.run_name, run)


def _existing(folder: str, key: str) -> Path:
    """The nearest folder above that exists, which must be writable."""
    path = Path(folder).absolute()
    place = next(one for one in (path, *path.parents) if one.exists())
    if not place.is_dir():
        raise UserError(f"{key}: {folder} cannot be made: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written: no rights in {place}, or it is mounted read-only.")
    return place


def _room(key: str, folder: Path, need: int | None, what: str) -> str:
    free = shutil.disk_usage(folder).free
    line = f"{key}: can be written, {free / 1e9:.1f} GB free"
    if need is None:
        return line
    enough = "" if free >= need else " WARNING: not enough."
    return f"{line}; {what}: {need / 1e9:.2f} GB.{enough}"


def _exports(recipe: Recipe, settings: HFCheckpointerConfig) -> int | None:
    """How many the run makes, where interval and length count the same thing."""
    length, every = parse(recipe.max_duration), parse(settings.save_interval)
    return -(-int(length.value) // int(every.value)) if length.unit == every.unit and every.value >= 1 else None
