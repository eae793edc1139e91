"""Whatever a user points at (run, checkpoint, ``.pt`` file, Hugging Face folder), opened."""

import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.hugging_face import is_hugging_face_folder, read_hf_folder
from llmtrain.checkpoint.read import read_weights, recipe_of
from llmtrain.checkpoint.resolve import locate, run_folder
from llmtrain.checkpoint.weights import Weights
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.tokenizer import TokenizerConfig, fingerprint
from llmtrain.trust import FLAG, trusted

TOKENIZER = "tokenizer"
"""The folder of a run's tokenizer, or of an imported checkpoint's."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A model as it lies on disk."""

    path: Path
    """The checkpoint that was chosen, or the Hugging Face folder."""
    config: MPTConfig
    weights: Weights
    """By MPT's names, on the CPU, in the dtype that was saved; each is read when it is asked for."""
    tokenizer: TokenizerConfig | None
    """Where its tokenizer is (a folder or a hub name), or None when nothing says so."""


def open_source(path: Path, recipe: Path | None = None) -> Source:
    """Open a model in a run, a checkpoint, a ``.pt`` file or a Hugging Face folder.

    Args:
        path: Anything of those; a run means its newest complete checkpoint.
        recipe: The YAML file with the model's config, for a checkpoint that carries none.

    Raises:
        UserError: nothing there, damaged, not MPT, or a tokenizer that the run was not trained with.
    """
    if path.is_dir() and is_hugging_face_folder(path):
        config, weights = read_hf_folder(path)
        beside = TokenizerConfig(name=str(path)) if (path / "tokenizer.json").is_file() else None
        return Source(path, config, weights, beside)
    checkpoint = locate(path)
    # `locate` has hashed what it chose itself; what it was given, it returns as it is.
    config, weights = read_weights(checkpoint, recipe=recipe, verified=checkpoint != path)
    return Source(checkpoint, config, weights, tokenizer_of(checkpoint, recipe))


def tokenizer_of(checkpoint: Path, recipe: Path | None) -> TokenizerConfig | None:
    """The tokenizer of a checkpoint: its own folder, the run's, else what its recipe names; None when nothing says so.

    Raises:
        UserError: the run's tokenizer is not the one that the checkpoint was trained with, or the checkpoint's recipe
            asks for code to be run.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    # In the checkpoint's own folder: of an import, which belongs to no run.
    own = folder if (folder / manifest.MANIFEST).is_file() else None
    for place in (own, run_folder(checkpoint)):
        if place is None or not (place / TOKENIZER / "tokenizer.json").is_file():
            continue
        found = TokenizerConfig(name=str(place / TOKENIZER))
        _check_fingerprint(folder, found)
        return found
    block = (recipe_of(checkpoint, recipe) or {}).get("tokenizer")
    try:
        named = TokenizerConfig.model_validate(block) if isinstance(block, dict) else None
    except ValidationError:
        log.warning("%s: the tokenizer in its recipe is not usable: %s", checkpoint, block)
        return None
    if named is not None and recipe is None and named.kwargs.get("trust_remote_code") and not trusted():
        raise UserError(
            f"{checkpoint}: the recipe that came with it wants the tokenizer {named.name!r} opened with its own Python "
            f"code (tokenizer.kwargs.trust_remote_code). If you have read that code and trust it: {FLAG}. Or name "
            "another: --recipe x.yaml"
        )
    return named


def _check_fingerprint(folder: Path, found: TokenizerConfig) -> None:
    if not (folder / manifest.MANIFEST).is_file():
        return
    wanted = manifest.read(folder).tokenizer_fingerprint
    if wanted is not None and fingerprint(found.name) != wanted:
        raise UserError(
            f"{found.name} is not the tokenizer that {folder.name} was trained with (its fingerprint differs); put the "
            "run's own tokenizer back."
        )
