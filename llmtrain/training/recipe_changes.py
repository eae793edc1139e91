"""What may change in a recipe between a checkpoint and the run that continues from it."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.redaction import redact

FREE_MODEL_KEYS = {
    # What changes neither the weights' shapes nor the function that they compute.
    ("resid_pdrop",),
    ("emb_pdrop",),
    ("attn_config", "attn_pdrop"),
    ("attn_config", "attn_impl"),
    ("attn_config", "alibi_window"),
    ("attn_config", "flex_backend"),
    ("attn_config", "attn_uses_sequence_id"),  # a single document is the same function with it and without
    ("init_config",),
    ("init_device",),
    ("loss_fn",),
    ("use_cache",),
    ("embedding_fraction",),
    ("max_seq_len",),
    ("activation_checkpointing_target",),
    ("pretrained",),
    # Of Hugging Face models.
    ("attn_implementation",),
    ("use_flash_attention_2",),
    ("trust_remote_code",),
    ("allow_embedding_resizing",),
    ("use_train_metrics",),
    ("peft_config", "lora_dropout"),
}
WATCHED = (
    "run_name",
    "optimizer",
    "scheduler",
    "algorithms",
    "global_train_batch_size",
    "max_duration",
    "train_loader",
    "seed",
)


def differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Path -> (old, new) of each leaf that differs between two nested dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[tuple[str, ...], tuple[Any, Any]] = {}
        for key in {**old, **new}:
            found |= differences(old.get(key), new.get(key), (*path, str(key)))
        return found
    return {} if old == new else {path: (old, new)}


def check_model(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path, *, weights_only: bool = False) -> None:
    """Refuses to load weights into a model that has other shapes, or computes another function with them.

    Args:
        saved: the recipe of the checkpoint.
        now: the recipe of the run.
        checkpoint: for the message.
        weights_only: a new run starts from the weights; its vocabulary may be larger then.

    Raises:
        UserError: names each key that differs.
    """
    if not saved.get("model"):
        return
    free = set(FREE_MODEL_KEYS)
    if weights_only and vocabulary_grows(saved, now):
        free.add(("vocab_size",))
    changed = {
        path: values
        for path, values in differences(*_with_defaults(saved["model"], now["model"])).items()
        if not any(path[: len(key)] == key for key in free)
    }
    if changed:
        raise UserError(
            f"the model is not the one of {checkpoint}: {_text(changed, 'model')}. "
            "Change the recipe back, or choose another run_name to start a new run."
        )


def _with_defaults(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """MPTs' blocks with all keys, also those that did not exist yet when they were saved; others as they are."""
    try:
        known = [MPTConfig.model_validate(model) for model in (saved, now)]
    except ValidationError:
        return saved, now
    # With ALiBi the key means nothing: recipes leave it at true, the config.json of an imported MPT says false.
    old, new = (model.model_dump(mode="json") | {"learned_pos_emb": model.uses_learned_positions} for model in known)
    return old, new


def vocabulary_grows(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the model has more embeddings than the one that was saved."""
    before, after = (recipe.get("model", {}).get("vocab_size") for recipe in (saved, now))
    return before is not None and after is not None and bool(after > before)


def check_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> list[str]:
    """Compares the recipes of a checkpoint and of the run that continues from it.

    Returns:
        A line for each change that makes it another run.

    Raises:
        UserError: another model, or an optimizer whose saved state does not fit.
    """
    if not saved:  # a checkpoint that carries no recipe
        return []
    saved, now = redact(saved), redact(now)  # the checkpoint's has no secrets
    check_model(saved, now, checkpoint)
    for key in ("name", "param_groups", "disable_grad"):
        old, new = (recipe.get("optimizer", {}).get(key) for recipe in (saved, now))
        if saved.get("optimizer") and old != new:
            raise UserError(
                f"optimizer.{key} was {old!r} in {checkpoint} and is {new!r} now: its saved state does not fit. "
                "Change it back, or start a new run with load_path=... load_weights_only=true and another run_name."
            )
    lines = []
    sees = ("attn_config", "attn_uses_sequence_id")
    if sees in (changed := differences(*_with_defaults(saved.get("model") or {}, now.get("model") or {}))):
        lines.append(f"warning: not as in {checkpoint.name}: {_text({sees: changed[sees]}, 'model')}")
    for key in WATCHED:
        changed = differences(saved.get(key), now.get(key))
        if changed:
            note = " (the learning-rate schedule changes with it)" if key == "max_duration" else ""
            lines.append(f"warning: not as in {checkpoint.name}{note}: {_text(changed, key)}")
    return lines


def _text(changed: dict[tuple[str, ...], tuple[Any, Any]], top: str) -> str:
    return ", ".join(f"{'.'.join((top, *path))} {old} -> {new}" for path, (old, new) in changed.items())
