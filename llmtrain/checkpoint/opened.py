"""A written Hugging Face folder as transformers sees it: the class that it opens, and the keys that this asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain.checkpoint.layouts import Layout
from llmtrain.errors import UserError
from llmtrain.quiet_transformers import quiet_transformers


def is_our_code(folder: Path, layout: Layout) -> bool:
    """Whether the folder's modelling files are, byte for byte, those that llmtrain ships: nothing else is ever run."""
    files = layout.files()
    there = {file.name for file in folder.glob("*.py")}
    return there == {name for name in files if name.endswith(".py")} and all(
        (folder / name).read_bytes() == content.encode() for name, content in files.items()
    )


def without_weights(folder: Path, layout: Layout) -> Any:
    """The model that ``AutoModelForCausalLM`` makes of the folder's config.json, on the meta device, in float32.

    Raises:
        UserError: transformers picks another class than the layout's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    remote = layout.needs_trust_remote_code
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if type(model).__name__ != layout.architecture:
        raise UserError(f"{folder}: transformers opens it as {type(model).__name__}, not as {layout.architecture}.")
    _fill_buffers(model)
    return model.eval()


def with_weights(folder: Path, layout: Layout) -> tuple[Any, list[str]]:
    """The model as users open it, with its weights, and what transformers complains of: one line each."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        # No dtype here: its name differs between transformers 4 and 5, and both casts to float32 are exact.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=layout.needs_trust_remote_code,
        )
    problems = [
        f"transformers reports {kind.replace('_', ' ')}: {_some(map(str, info[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    ]
    return model.eval(), problems


def key_problems(model: Any, stored: Mapping[str, torch.Size]) -> list[str]:
    """Which keys of the files do not fit the class: missing, unexpected, of another shape; one line each kind.

    Args:
        model: Of :func:`without_weights`.
        stored: What the files hold: name -> shape.
    """
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    if (tied := tied_head(model)) is not None:
        del wanted[tied]  # transformers ties it by itself
    problems = []
    if missing := wanted.keys() - stored.keys():
        problems.append(f"transformers reports missing keys: {_some(missing)}")
    if unexpected := stored.keys() - wanted.keys():
        problems.append(f"transformers reports unexpected keys: {_some(unexpected)}")
    both = wanted.keys() & stored.keys()
    if other := [
        f"{n} ({list(stored[n])} for {list(wanted[n])})" for n in both if tuple(stored[n]) != tuple(wanted[n])
    ]:
        problems.append(f"transformers reports mismatched keys: {_some(other)}")
    return problems


def tied_head(model: Any) -> str | None:
    """Name of the head's weight where it is the embedding."""
    return "lm_head.weight" if model.config.tie_word_embeddings else None


def embedding(model: Any) -> str:
    """Name of the embedding's weight."""
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


def _fill_buffers(model: nn.Module) -> None:
    """Make the modules anew that compute buffers from the config (rotary frequencies): on meta they have no values."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            if list(module.parameters()) or "rotary" not in type(module).__name__.lower():
                raise UserError(f"{type(model).__name__}.{name} has buffers that cannot be computed without weights.")
            made = type(module)(config=module.config)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made)


def _some(items: Any, limit: int = 6) -> str:
    names = sorted(items)
    return f"{names[:limit]}" + (f" ({len(names)} in all)" if len(names) > limit else "")
