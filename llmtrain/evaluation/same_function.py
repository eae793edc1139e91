"""Whether an evaluation recipe's `model` and `tokenizer` agree with what lies beside the weights."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KERNEL = ("attn_config.attn_impl", "attn_config.flex_backend", "attn_config.alibi_window")
"""How attention is computed: taken from the recipe, it changes nothing else."""

_OF_TRAINING = (
    *("name", "pretrained", "init_device", "init_config", "loss_fn", "use_cache", "verbose", "fc_type"),
    *("resid_pdrop", "emb_pdrop", "embedding_fraction", "attn_config.attn_pdrop", "attn_config.attn_uses_sequence_id"),
    *("activation_checkpointing_target", "max_seq_len", "attn_config.fused_qkv"),
)
"""Keys that have no part in an evaluation. Learned positions are checked by their shape."""


def as_recipe_says(stored: MPTConfig, recipe: MPTConfig, where: str) -> MPTConfig:
    """The config that lies beside the weights, with the recipe's choice of the kernel.

    Args:
        stored: what the weights say.
        recipe: the recipe's `model`; only keys that it gives are looked at.
        where: the weights, for messages.

    Raises:
        UserError: a key that decides on the function has another value.
    """
    theirs, given = dict(_leaves(stored.model_dump())), dict(_leaves(recipe.model_dump(exclude_unset=True)))
    wrong = [
        f"model.{key}: {value}, and these weights were trained with {theirs.get(key)}"
        for key, value in given.items()
        if key not in _KERNEL and not key.startswith(_OF_TRAINING) and theirs.get(key) != value
    ]
    if wrong:
        raise UserError(
            f"{where}: the recipe describes another model: {'; '.join(wrong)}. Remove what the weights say themselves"
        )
    kernel = {key.partition(".")[2]: value for key, value in given.items() if key in _KERNEL}
    return stored.model_copy(update={"attn_config": stored.attn_config.model_copy(update=kernel)})


def check_same_tokens(wanted: "PreTrainedTokenizerFast", stored: "PreTrainedTokenizerFast", where: str) -> None:
    """Refuse a tokenizer with other ids than the one that lies beside the weights.

    Raises:
        UserError: a token that both have has two ids.
    """
    theirs = stored.get_vocab()
    ours = wanted.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, number) != number:
            raise UserError(
                f"{where}: `tokenizer` {wanted.name_or_path} is not the one of these weights: {token!r} is {number} in "
                f"it and {theirs[token]} beside the weights. Remove the key, or name the right one"
            )
    if not ours.keys() & theirs.keys():
        raise UserError(f"{where}: `tokenizer` {wanted.name_or_path} has no token in common with that of the weights")


def _leaves(block: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
