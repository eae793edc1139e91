"""`model.pretrained`: the model's keys and weights, taken from something that was trained before. Light at import."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.fetch import config_file, fetch, local_path
from llmtrain.checkpoint.growth import grow_embeddings, grown_vocab_size
from llmtrain.checkpoint.hugging_face_config import from_hugging_face
from llmtrain.checkpoint.resolve import CHECKPOINTS, checkpoints_in, run_folder
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json
from llmtrain.model.config import MPTConfig

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights

__all__ = ["fetch", "fill_model", "pretrained_config", "read_pretrained"]

log = logging.getLogger(__name__)

_BELONG_TO_THE_RUN: dict[str, Any] = {
    # What a recipe says about training, whatever the weights were trained with before.
    **dict.fromkeys(("name", "pretrained", "init_config", "init_device", "loss_fn", "use_cache", "verbose"), True),
    **dict.fromkeys(("resid_pdrop", "emb_pdrop", "embedding_fraction"), True),
    "attn_config": {"attn_pdrop", "attn_impl", "attn_uses_sequence_id", "alibi_window", "flex_backend"},
}
_MAY_DIFFER = {
    # The weights fit and are the same function to begin with or nearly so; a published run does it (StoryWriter starts
    # from MPT-7B with another alibi_bias_max and clip_qkv; Llama 3.1 from Llama 3 with scaled rotary positions).
    *("attn_config.alibi_bias_max", "attn_config.clip_qkv", "attn_config.softmax_scale", "logit_scale", "norm_eps"),
    *("attn_config.rope_theta", "attn_config.rope_hf_config", "attn_config.sliding_window_size"),
}


def pretrained_config(pretrained: str) -> dict[str, Any]:
    """The keys of `model:` that the weights were made with, for a recipe that leaves them out. Imports no torch.

    From a URI or the hub only the config is downloaded. Keys of training (dropouts, initialisation, kernel, document
    mask) are left out, and `max_seq_len` where the model has ALiBi and so no fixed length.

    Returns:
        Nested keys as in a recipe; empty where the weights do not say it (a checkpoint of another trainer).

    Raises:
        UserError: nothing there, not MPT, or a model that is not supported.
    """
    path = local_path(pretrained)
    if path is not None:
        config = _config_beside(path)
    else:
        with config_file(pretrained) as file:
            config = None if file is None else _config_in(file)
    return {} if config is None else _keys_of(config)


def fill_model(model: Mapping[str, Any], tokens: int = 0) -> dict[str, Any]:
    """A recipe's `model:` block with the keys that it leaves out taken from its `pretrained`.

    A block that leaves nothing out (that of a run's own recipe.yaml) needs no source any more.

    Args:
        model: As it stands in the recipe, malformed or not.
        tokens: Ids that the recipe's tokenizer uses: a vocabulary that is taken from the source grows to hold them.

    Raises:
        UserError: as :func:`pretrained_config`.
    """
    given = model.get("pretrained")
    if not isinstance(given, str) or not given or _says_all(model, _keys_of(MPTConfig())):
        return dict(model)
    found = pretrained_config(given)
    if "vocab_size" in found:
        found["vocab_size"] = grown_vocab_size(found["vocab_size"], tokens)
    return _merged(model, found)


def read_pretrained(path: Path, config: MPTConfig) -> "Weights":
    """The weights to start training from, grown to the recipe's vocabulary.

    Args:
        path: What :func:`fetch` returned.
        config: The model of the recipe.

    Returns:
        By MPT's names, in the dtype that was saved; each is read when it is asked for.

    Raises:
        UserError: the weights are of another model (each key that differs is named), damaged, or cannot be read.
    """
    from llmtrain.checkpoint.hugging_face import is_hugging_face_folder, read_hf_folder
    from llmtrain.checkpoint.read import read_weights

    if path.is_dir() and is_hugging_face_folder(path):
        source, weights = read_hf_folder(path)
    else:
        source, weights = read_weights(path, otherwise=config)
    _compare(source, config, path)
    return grow_embeddings(weights, config.vocab_size)


def _config_beside(path: Path) -> MPTConfig | None:
    """Of a Hugging Face folder, a checkpoint, a run, or a file or folder in a run."""
    if (path / "config.json").is_file():
        return _config_in(path / "config.json")
    folder = path if path.is_dir() else path.parent
    within = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    # Any checkpoint of a run tells: they are of one model. Which of them is intact is found out when weights are read.
    run = folder if within != folder else run_folder(path)
    beside = [folder / manifest.MANIFEST, *(i.path / manifest.MANIFEST for i in checkpoints_in(within) if i.manifest)]
    beside += [place / "recipe.yaml" for place in (folder, run) if place is not None]
    return next((_config_in(file) for file in beside if file.is_file()), None)


def _config_in(file: Path) -> MPTConfig | None:
    """Of a config.json, a manifest.json or a recipe.yaml."""
    if file.name == "config.json":
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected a JSON object.")
        return from_hugging_face(content, str(file))
    if file.name == manifest.MANIFEST:
        recipe = manifest.read(file.parent).recipe
    else:
        from llmtrain.recipe.load import load_recipe

        recipe = load_recipe(file).model_dump(mode="json")
    block = recipe.get("model")
    if not isinstance(block, dict) or block.get("name", "mpt_causal_lm") != "mpt_causal_lm":
        if isinstance(block, dict):
            raise UserError(f"{file}: the model there is {block['name']!r}; model.pretrained needs an MPT.")
        return None
    try:
        return MPTConfig.model_validate(block)
    except ValidationError as error:
        lines = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{file}: the model in it cannot be built: {lines}") from None


def _keys_of(config: MPTConfig) -> dict[str, Any]:
    keys = config.model_dump(mode="json", exclude=_BELONG_TO_THE_RUN)
    if not config.uses_learned_positions:
        del keys["max_seq_len"]
    return keys


def _says_all(block: Any, keys: Mapping[str, Any]) -> bool:
    """Whether the block has every key, at every depth (a key that may hold any block counts once)."""
    return isinstance(block, Mapping) and all(
        key in block and (not isinstance(value, dict) or _says_all(block[key], value)) for key, value in keys.items()
    )


def _merged(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with what it does not say (or says null to, as a whole block) from `defaults`."""
    merged = dict(given)
    for key, value in defaults.items():
        if key not in merged or (merged[key] is None and isinstance(value, dict)):
            merged[key] = value
        elif isinstance(merged[key], Mapping) and isinstance(value, dict):
            merged[key] = _merged(merged[key], value)
    return merged


def _compare(source: MPTConfig, config: MPTConfig, path: Path) -> None:
    """Refuses another model by key; says which keys make the same weights another function."""
    keys = {"expansion_ratio", "learned_pos_emb", "attention_bias", "vocab_size", "head_dim", "fc_type", "attn_type"}
    old, new = (_leaves(_keys_of(c), keys) | _derived(c) for c in (source, config))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    shown = {key: f"model.{key} is {new.get(key)} in the recipe and {old.get(key)} in the weights" for key in differing}
    if refused := [shown[key] for key in differing if key not in _MAY_DIFFER]:
        raise UserError(
            f"model.pretrained: {path} is another model: {'; '.join(refused)}. Remove these keys from the recipe: what "
            "it leaves out is taken from there."
        )
    for key in differing:
        log.warning("%s: with these weights it is another function than before.", shown[key])


def _leaves(block: Mapping[str, Any], without: set[str], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in block.items():
        if key in without or key.startswith(("rope", "ffn_hidden_size", "kv_n_heads")):
            continue
        if key == "max_seq_len" or not isinstance(value, dict):
            found[prefix + key] = value
        else:
            found |= _leaves(value, without, f"{prefix}{key}.")
    return found


def _derived(config: MPTConfig) -> dict[str, Any]:
    """What several keys say together, in one spelling."""
    attn = config.attn_config
    scaling = attn.rope_hf_config if attn.rope and attn.rope_impl == "hf" else None
    scaled = scaling is not None and scaling.type != "no_scaling"
    return {
        "head_dim": config.d_head,
        "attn_config.kv_n_heads": config.kv_heads,
        "attn_config.rope": attn.rope,
        "attn_config.rope_theta": attn.rope_theta if attn.rope else None,
        "attn_config.rope_hf_config": scaling.model_dump(exclude_none=True) if scaling and scaled else None,
        "ffn_config.ffn_hidden_size": config.ffn_hidden_size,
        "attention_bias": config.qkv_bias,
        "learned_pos_emb": config.uses_learned_positions,
        "logit_scale": config.logit_factor,
        "attn_config.softmax_scale": config.softmax_scale,
        "norm_type": config.norm_type.removeprefix("low_precision_"),
    }
