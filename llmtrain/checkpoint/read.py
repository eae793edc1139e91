"""Weights out of a training checkpoint: sharded or full, ours or another Composer trainer's (llm-foundry)."""

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.names import check_shapes, under_own_names
from llmtrain.checkpoint.resolve import locate, run_folder
from llmtrain.checkpoint.sharded import ShardedTensors
from llmtrain.checkpoint.torch_file import open_torch_file
from llmtrain.checkpoint.weights import Renamed, Weights
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.redaction import redact, without_masked

log = logging.getLogger(__name__)

_SHARDED_PREFIX = "state.model."


def read_weights(
    path: Path, *, recipe: Path | None = None, verified: bool = False, otherwise: MPTConfig | None = None
) -> tuple[MPTConfig, Weights]:
    """Open the model, and only the model, of a checkpoint: on the CPU, in the dtype that was saved.

    Its tensors are read when they are asked for, one at a time. No process group, no GPU, and not the number of ranks
    that wrote it. A checkpoint with a manifest is verified first; one without (another trainer's) is read with a
    warning. Nothing in the files is run.

    Args:
        path: A checkpoint folder or ``.pt`` file, or anything else that :func:`locate` understands.
        recipe: The YAML file with the model's config; needed where the checkpoint does not carry one.
        verified: The caller has just compared the files with the manifest.
        otherwise: The model to assume where the checkpoint does not say which it holds; with as many embeddings as the
            checkpoint has.

    Returns:
        The config, and the parameters by MPT's own names (``transformer.wte.weight``, ...), complete and of the
        config's shapes.

    Raises:
        UserError: damaged files, code in a pickle, no config, or parameters that do not fit the config.
    """
    source = locate(path)
    folder = source if source.is_dir() else source.parent
    # A path that `locate` replaced is the newest complete checkpoint of a run: it was hashed to find that out.
    content = _manifest(folder, source, verified=verified or source != path)
    data = content.recipe if content is not None and recipe is None else recipe_of(source, recipe)
    config = otherwise if data is None and otherwise is not None else _config(source, data)
    any_rows = config is otherwise
    if source.is_dir() and (content is None or content.kind == "sharded"):
        return _read_sharded(source, config, any_rows)
    return _read_full(source if source.is_file() else _full_file(folder, content), config, any_rows)


def recipe_of(path: Path, recipe: Path | None = None) -> dict[str, Any] | None:
    """The resolved recipe that belongs to a checkpoint: the given file, the manifest's, or the run's ``recipe.yaml``.

    Returns:
        The recipe as plain data, or None when there is none. What was masked in it is left out: it is looked for where
        it is looked for by itself (the environment).
    """
    folder = path if path.is_dir() else path.parent
    if recipe is not None:
        return _load_recipe(recipe)
    if (folder / manifest.MANIFEST).is_file():
        known: dict[str, Any] = without_masked(redact(manifest.read(folder).recipe))
        return known
    run = run_folder(path)
    beside = [place / "recipe.yaml" for place in (folder, *([run] if run else []))]
    for candidate in beside:
        if candidate.is_file():
            return _load_recipe(candidate)
    return None


def _load_recipe(path: Path) -> dict[str, Any]:
    from llmtrain.recipe.load import load_recipe

    data: dict[str, Any] = load_recipe(path).model_dump(mode="json")
    return data


def _manifest(folder: Path, source: Path, *, verified: bool) -> manifest.Manifest | None:
    if not (folder / manifest.MANIFEST).is_file():
        log.warning("%s has no %s: its files cannot be verified.", source, manifest.MANIFEST)
        return None
    if not verified and (problems := manifest.verify(folder)):
        raise UserError(f"{folder} is damaged: " + "; ".join(problems))
    return manifest.read(folder)


def _config(source: Path, data: dict[str, Any] | None) -> MPTConfig:
    if data is None:
        raise UserError(
            f"{source}: the checkpoint does not say which model it holds (no {manifest.MANIFEST}, no recipe.yaml). "
            "Pass its recipe: --recipe yamls/x.yaml"
        )
    block = data.get("model")
    if not isinstance(block, dict):
        raise UserError(f"{source}: its recipe has no `model:` block. Pass another: --recipe yamls/x.yaml")
    try:
        return MPTConfig.model_validate(block)
    except ValidationError as error:
        lines = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{source}: the model in its recipe cannot be built: {lines}") from None


def _full_file(folder: Path, content: manifest.Manifest | None) -> Path:
    names = [name for name in (content.files if content else ()) if name.endswith(".pt")]
    if len(names) != 1:
        raise UserError(f"{folder}: expected one .pt file in a full checkpoint, found {len(names)}: {names}")
    return folder / names[0]


def _read_sharded(folder: Path, config: MPTConfig, any_rows: bool) -> tuple[MPTConfig, Weights]:
    stored = ShardedTensors(folder)
    inside = {name.removeprefix(_SHARDED_PREFIX): name for name in stored if name.startswith(_SHARDED_PREFIX)}
    if not inside:
        raise UserError(f"{folder}: holds no `{_SHARDED_PREFIX}*` tensors; it is no Composer checkpoint of a model.")
    return _checked(Renamed(stored, inside), config, any_rows, folder)


def _read_full(path: Path, config: MPTConfig, any_rows: bool) -> tuple[MPTConfig, Weights]:
    stored = open_torch_file(path, ("state", "model"), ())
    if stored is None:
        raise UserError(f"{path}: holds neither a Composer checkpoint (['state']['model']) nor a plain state dict.")
    return _checked(stored, config, any_rows, path)


def _checked(stored: Weights, config: MPTConfig, any_rows: bool, where: Path) -> tuple[MPTConfig, Weights]:
    """By MPT's own names, and complete."""
    weights = under_own_names(stored, config, str(where))
    if any_rows and "transformer.wte.weight" in weights:
        config = config.model_copy(update={"vocab_size": weights.shape("transformer.wte.weight")[0]})
    check_shapes(config, weights.shapes(), str(where))
    return config, weights
