"""Checkpoints of Hugging Face models: the weights in them, and the whole model put together again."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.hugging_face import read_json
from llmtrain.checkpoint.read import recipe_of
from llmtrain.checkpoint.resolve import locate
from llmtrain.checkpoint.sharded import ShardedTensors
from llmtrain.checkpoint.unpickle import load_full
from llmtrain.config.safe_yaml import read_yaml
from llmtrain.errors import UserError
from llmtrain.hf_model.build import parts
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import FROZEN_IDENTITY, OTHER_FROZEN_WEIGHTS, frozen_identity

_SHARDED = "state.model."


def is_hf_run(path: Path, recipe: Path | None = None) -> bool:
    """Whether a run, checkpoint or file is one of `hf_causal_lm`, by the recipe beside it; nothing is verified."""
    near = [path, path.parent, path.parent.parent] if path.exists() else []
    recipes = [recipe] if recipe is not None else [place / "recipe.yaml" for place in near]
    manifests = [] if recipe is not None else [place / manifest.MANIFEST for place in near[:2]]
    for file in (*manifests, *recipes):
        if not file.is_file():
            continue
        try:
            content = read_json(file) if file.suffix == ".json" else read_yaml(file)
        except UserError:
            continue  # whoever opens it says what is wrong
        content = content.get("recipe", content) if isinstance(content, dict) else {}
        model = content.get("model") if isinstance(content, dict) else None
        return isinstance(model, dict) and model.get("name") == "hf_causal_lm"
    return False


def hf_config_of(checkpoint: Path, recipe: Path | None = None) -> HFConfig:
    """The `model` block of a checkpoint of such a run.

    Raises:
        UserError: it cannot be read.
    """
    block = (recipe_of(checkpoint, recipe) or {}).get("model")
    try:
        return HFConfig.model_validate(block)
    except ValidationError as error:
        lines = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{checkpoint}: the model in its recipe cannot be built: {lines}") from None


def read_tensors(path: Path, *, verified: bool = False) -> dict[str, Tensor]:
    """The model's part of a checkpoint by HFCausalLM's names, on the CPU; a manifest is verified first.

    Args:
        path: a run or a checkpoint.
        verified: the caller has just compared the files with the manifest.

    Raises:
        UserError: it is damaged, or holds no model.
    """
    checkpoint = locate(path)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if (
        not verified
        and checkpoint == path
        and (folder / manifest.MANIFEST).is_file()
        and (problems := manifest.verify(folder))
    ):
        raise UserError(f"{folder} is damaged: " + "; ".join(problems))
    if (folder / ".metadata").is_file() and checkpoint.is_dir():
        stored = ShardedTensors(checkpoint)
        found = {name.removeprefix(_SHARDED): stored.read(name) for name in stored if name.startswith(_SHARDED)}
    else:
        content = load_full(checkpoint / "full.pt" if checkpoint.is_dir() else checkpoint)
        state = content.get("state") if isinstance(content, dict) else None
        model = state.get("model") if isinstance(state, dict) else None
        found = model if isinstance(model, dict) else {}
    if not found:
        raise UserError(f"{checkpoint}: holds no model (`state.model`).")
    return {_own_name(name): value for name, value in found.items()}


def open_checkpoint(path: Path, cfg: HFConfig, n_tokens: int, *, verified: bool = False) -> tuple[Any, Any]:
    """The model as it was trained: its weights, or its adapters on the weights that they were trained on.

    Args:
        path: a run or a checkpoint.
        cfg: its `model` block.
        n_tokens: ids of its tokenizer.
        verified: the caller has just compared the files with the manifest.

    Returns:
        The transformers model, and the PeftModel around it or None.

    Raises:
        UserError: it does not hold what the model needs, or the frozen weights are other ones.
    """
    tensors = read_tensors(path, verified=verified)
    identity = tensors.pop(FROZEN_IDENTITY, None)
    changes: dict[str, Any] = {"init_device": "cpu", "pretrained_lora_id_or_path": None, "should_save_peft_only": False}
    if identity is None:  # everything is in the checkpoint: the architecture is all that is needed
        changes["pretrained"] = False
    model, peft = parts(HFConfig.model_validate({**cfg.model_dump(), **changes}), n_tokens=n_tokens)
    outer = model if peft is None else peft
    if identity is not None and identity.tolist() != frozen_identity(outer):
        raise UserError(f"{path}: {OTHER_FROZEN_WEIGHTS}")
    wanted = dict(outer.named_parameters(remove_duplicate=False)) | dict(outer.named_buffers())
    needed = {name for name, p in outer.named_parameters() if p.requires_grad or identity is None}
    problems = [f"lacks `{name}`" for name in sorted(needed - tensors.keys())]
    problems += [f"also has `{name}`" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"has `{name}` of shape {list(value.shape)}, not {list(wanted[name].shape)}"
        for name, value in tensors.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if problems:
        raise UserError(f"{path}: is not of this model: it {'; it '.join(problems[:4])}.")
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    return model.eval(), peft


def _own_name(stored: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        stored = stored.replace(wrapper, "")
    return stored.removeprefix("module.").removeprefix("model.")
