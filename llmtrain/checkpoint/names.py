"""The names under which checkpoints keep MPT's parameters, and the check that all of them are there."""

from collections.abc import Iterable, Mapping

import torch

from llmtrain.checkpoint.weights import Renamed, Weights, equal
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT

# What wrappers put between the parts of a name: torch.compile, activation checkpointing, FSDP1.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
# What stands before MPT's own names: Composer's model holds MPT as `.model`, DDP holds everything as `.module`.
_PREFIXES = ("module.", "model.")
_TABLE, _HEAD = "transformer.wte.weight", "lm_head.weight"


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Map MPT's own parameter names to the names in the checkpoint.

    Raises:
        UserError: two names become the same one.
    """
    own: dict[str, str] = {}
    for stored in names:
        name = stored
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name in own:
            raise UserError(f"The checkpoint holds `{name}` twice: as `{own[name]}` and as `{stored}`.")
        own[name] = stored
    return own


def under_own_names(stored: Weights, config: MPTConfig, where: str) -> Weights:
    """Weights by MPT's own names, whatever wrappers or transformers' MptModel called them; without a tied head.

    Args:
        stored: As the files name them.
        config: Whether the head is tied.
        where: Of what messages speak.

    Raises:
        UserError: two names become the same one, or a tied head differs from the embedding.
    """
    names = strip_wrappers(stored)
    if _TABLE not in names and "wte.weight" in names:  # saved from MptModel, without the head
        names = {own if own.startswith("lm_head.") else f"transformer.{own}": old for own, old in names.items()}
    if config.tie_word_embeddings and _HEAD in names and _TABLE in names:
        if not equal(stored, names[_HEAD], names[_TABLE]):
            raise UserError(
                f"{where}: holds an lm_head of its own, different from the embedding, but the config ties them; set "
                "`tie_word_embeddings: false` in the model's recipe, or in config.json."
            )
        del names[_HEAD]
    return Renamed(stored, names)


def expected_shapes(config: MPTConfig) -> dict[str, torch.Size]:
    """Name -> shape of every parameter that a model of this config has (built on the meta device: no memory)."""
    return {name: value.shape for name, value in MPT(config, device="meta").state_dict().items()}


def check_shapes(config: MPTConfig, found: Mapping[str, torch.Size], where: str) -> None:
    """Compare the parameters that were found with those that the config asks for.

    Args:
        config: The model that the weights shall fill.
        found: Name -> shape.
        where: Of what the message speaks.

    Raises:
        UserError: lists the missing, unknown and differently shaped parameters by name.
    """
    wanted = expected_shapes(config)
    problems = []
    if missing := [name for name in wanted if name not in found]:
        problems.append(f"missing: {_some(missing)}")
    if unknown := [name for name in found if name not in wanted]:
        problems.append(f"not part of this model: {_some(unknown)}")
    if differing := [n for n in wanted if n in found and tuple(found[n]) != tuple(wanted[n])]:
        shown = [f"{n} is {list(found[n])}, the config says {list(wanted[n])}" for n in differing]
        problems.append(f"other shape: {_some(shown)}")
    if problems:
        raise UserError(f"{where}: the weights do not fit the model's config. " + "; ".join(problems))


def _some(items: list[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
