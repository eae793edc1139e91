"""What llmtrain computes with a transformers model is checked against transformers itself, before training.

There are hundreds of architectures. Some do something with the last hidden states that no config key tells, some take
no mask of documents. A few tokens through both show it, for the weights at hand.
"""

import logging

import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.hf_model.model import HFCausalLM

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference relative to the largest logit: far above rounding in float32, far below another function."""
TOLERANCE_LOW = 6e-2
"""The same for weights in bfloat16 or float16."""


def check_function(model: HFCausalLM) -> None:
    """Compares logits, and those of packed rows, on a few random tokens; on the device of the weights.

    What keeps documents apart and does not work is noted in `model.no_documents`; a forward with packed rows raises it.

    Raises:
        UserError: the logits are not transformers' own.
    """
    if model.config._attn_implementation == "flash_attention_2":
        model.no_documents = "attn_implementation: flash_attention_2 takes no mask of documents here; use sdpa"
        return  # runs on GPUs only, and not in float32
    training = model.training
    model.eval()
    rows = min(model.hf.get_input_embeddings().weight.shape[0], int(model.config.get_text_config().vocab_size))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (1, 9), generator=generator)
    with torch.inference_mode():
        ours = _logits(model, ids)
        theirs = _through_transformers(model, ids)
        low = model.hf.get_input_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
        tolerance = TOLERANCE_LOW if low else TOLERANCE
        difference = _relative(ours, theirs)
        if not difference <= tolerance:
            raise UserError(
                f"model: {model.config.model_type}: llmtrain's logits differ from transformers' own by "
                f"{difference:.1e} of the largest: this architecture does something to them that llmtrain does not "
                "know, so it is not trained."
            )
        model.no_documents = _documents_problem(model, ids, tolerance)
    model.train(training)


def _through_transformers(model: HFCausalLM, ids: Tensor) -> Tensor:
    """Transformers' own forward, which calls the head with hidden states and takes a tensor from it."""
    out = model.hf.get_output_embeddings()
    handle = out.register_forward_hook(lambda module, args, output: getattr(output, "logits", output))
    try:
        logits: Tensor = model.hf(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits


def _documents_problem(model: HFCausalLM, ids: Tensor, tolerance: float) -> str | None:
    """Two documents in a padded row must give what each gives alone."""
    first, second = ids[:, :4], ids[:, 4:]
    row = torch.cat([first, second, ids[:, :2]], dim=1)
    sequence_id = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2])
    what = f"{model.config.model_type} with {model.config._attn_implementation} attention"
    try:
        together = model(row, sequence_id=sequence_id).logits
        apart = [_logits(model, part) for part in (first, second)]
    except UserError as problem:
        return str(problem)
    except Exception as problem:  # whatever an architecture does with a mask that it does not expect
        log.info("%s takes no mask of documents: %s", what, problem)
        return f"{what} takes no mask that keeps packed examples apart"
    if not _relative(together[:, :9], torch.cat(apart, dim=1)) <= tolerance:
        return f"{what} does not keep packed examples apart"
    return None


def _logits(model: HFCausalLM, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits


def _relative(ours: Tensor, theirs: Tensor) -> float:
    size = max(theirs.abs().max().item(), 1e-6)
    return (ours.float() - theirs.float()).abs().max().item() / size
