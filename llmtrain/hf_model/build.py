"""From the recipe's `model` block to a model with weights, or to its shape on the meta device."""

import contextlib
import logging
from typing import Any

import torch
from torch import nn

from llmtrain.hf_model import load, lora
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.hf_model.probe import check_function

log = logging.getLogger(__name__)


def build(cfg: HFConfig, *, device: str | torch.device = "cpu", n_tokens: int = 0) -> HFCausalLM:
    """A model from a local folder or the hub, ready to train.

    Args:
        cfg: the recipe's `model`.
        device: "cpu" for the weights, or "meta" for parameters without values (another rank has them).
        n_tokens: ids of the tokenizer; the embeddings grow when the model has fewer rows.

    Raises:
        UserError: something in `cfg` does not fit the model, or the model cannot be trained here.
    """
    made = HFCausalLM(*parts(cfg, device=device, n_tokens=n_tokens))
    if torch.device(device).type != "meta":
        check_function(made)
    if cfg.saves_adapters_only:
        made.keep_frozen_identity()
    return made.train()


def parts(cfg: HFConfig, *, device: str | torch.device = "cpu", n_tokens: int = 0) -> tuple[Any, Any]:
    """The transformers model, and the PeftModel around it or None; arguments and errors as `build` has them."""
    config = load.read_config(cfg)
    dtype = load.dtype_of(cfg, config)
    old = int(config.get_text_config().vocab_size)
    rows = load.vocab_size(config, n_tokens, may_grow=cfg.allow_embedding_resizing)
    on_meta = torch.device(device).type == "meta"
    with load.parameters_on_meta() if on_meta else contextlib.nullcontext():
        if cfg.pretrained and not on_meta:
            model = load.with_weights(cfg, config, dtype)
            load.grow(model, rows)
        else:
            config.get_text_config().vocab_size = rows
            model = load.without_weights(cfg, config, dtype)
        peft = lora.add_adapters(model, cfg, weights=not on_meta) if cfg.peft_config else None
    if peft is not None and rows > old and not on_meta and not model.get_input_embeddings().weight.requires_grad:
        log.warning(
            "The tokenizer needs %d more embeddings than the model has, and peft_config freezes them. To train the new "
            "tokens, add the layer to peft_config.modules_to_save (embed_tokens and lm_head in most architectures).",
            n_tokens - old,
        )
    trained_in_float32(model)
    return model, peft


def trained_in_float32(model: nn.Module) -> None:
    """Casts every parameter that is trained to float32, as the optimizer needs it."""
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad and parameter.dtype != torch.float32:
                made.setdefault(id(parameter), nn.Parameter(parameter.detach().float()))
                setattr(module, name, made[id(parameter)])
