"""Low-rank adapters through PEFT."""

import warnings
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.unpickle import refuse_code
from llmtrain.errors import UserError
from llmtrain.hf_model.config import HFConfig, LoRAConfig
from llmtrain.hf_model.load import UNREADABLE, reason, refuse_missing_folder

INSTALL = "pip install 'llmtrain[peft]'"
ADAPTER = "default"
"""PEFT's name of the adapter; part of its parameters' names in checkpoints."""


def require_peft() -> Any:
    """The package, or a UserError with the line that installs it."""
    try:
        import peft
    except ImportError:
        raise UserError(f"model.peft_config: adapters need the package peft, which is missing: {INSTALL}") from None
    return peft


def peft_config(cfg: LoRAConfig) -> Any:
    """The recipe's block as PEFT's own config."""
    settings = cfg.model_dump(exclude={"peft_type", "task_type"}, exclude_none=True)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
        if isinstance(settings.get(key), tuple):
            settings[key] = list(settings[key])
    return require_peft().LoraConfig(task_type="CAUSAL_LM", **settings)


def add_adapters(model: Any, cfg: HFConfig, *, weights: bool = True) -> Any:
    """Freezes a model and gives it adapters (a PeftModel around it).

    Args:
        model: a PreTrainedModel.
        cfg: with a `peft_config`.
        weights: read `pretrained_lora_id_or_path` if there is one.

    Raises:
        UserError: peft is missing, no layer matches, or the given adapter is another one.
    """
    peft = require_peft()
    assert cfg.peft_config is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            wrapped = peft.get_peft_model(model, peft_config(cfg.peft_config), adapter_name=ADAPTER)
    except (ValueError, KeyError) as problem:
        raise UserError(f"model.peft_config: {problem}") from None
    if weights and cfg.pretrained_lora_id_or_path is not None:
        _load_adapter(wrapped, cfg.pretrained_lora_id_or_path)
    return wrapped


def _load_adapter(wrapped: Any, name: str) -> None:
    peft = require_peft()
    from peft.utils import load_peft_weights

    key = "pretrained_lora_id_or_path"
    refuse_missing_folder(name, key)
    refuse_code(Path(name).expanduser())
    try:
        saved = peft.LoraConfig.from_pretrained(name)
        weights = load_peft_weights(name, device="cpu")
    except UNREADABLE as problem:
        raise UserError(f"model.{key}: {name!r} cannot be opened: {reason(problem)}") from None
    mine = wrapped.peft_config[ADAPTER]
    for setting in ("r", "lora_alpha", "use_rslora"):
        if getattr(saved, setting) != getattr(mine, setting):
            raise UserError(
                f"model.peft_config.{setting}: {getattr(mine, setting)} here, {getattr(saved, setting)} in {name}. "
                "Give the adapter's own."
            )
    result = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=ADAPTER)
    missing = [key for key in result.missing_keys if f".{ADAPTER}." in key or key.endswith(f".{ADAPTER}")]
    if missing or result.unexpected_keys:
        different = [*missing, *result.unexpected_keys]
        raise UserError(
            f"model.{key}: {name} has other adapters than peft_config describes: {', '.join(different[:4])}. "
            "Give the target_modules of its adapter_config.json."
        )
