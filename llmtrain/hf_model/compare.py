"""Proof that an exported Hugging Face model is the one that was trained: it is opened as users open it, and asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from llmtrain.checkpoint.compare import GREEDY_TOKENS, PROMPT_TOKENS, TOLERANCE, Comparison
from llmtrain.checkpoint.tensor_bytes import bytes_of
from llmtrain.errors import UserError
from llmtrain.hf_model.load import cast
from llmtrain.hf_model.lora import require_peft
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.quiet_transformers import quiet_transformers

if TYPE_CHECKING:
    from llmtrain.hf_model.source import HFSource

MERGED = 1e-4
"""Largest difference relative to the largest logit between adapters beside the weights and merged into them, in
float32: W x + B (A x) and (W + B A) x round differently, by about 1e-6 a layer."""


def merging_changes_nothing(peft: Any) -> Any:
    """Merges adapters into their weights; both in float32.

    Returns:
        The transformers model without PEFT.

    Raises:
        UserError: the merged model computes something else.
    """
    peft.eval()
    ids, mask = prompts(peft.get_base_model())
    with torch.inference_mode():
        before = peft.get_base_model()(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    with torch.no_grad():
        merged = peft.merge_and_unload(safe_merge=True)
    with torch.inference_mode():
        after = merged(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    difference = (before - after).abs().max().item() / max(before.abs().max().item(), 1e-6)
    if not difference <= MERGED:
        raise UserError(
            f"The adapters cannot be merged: the logits change by {difference:.1e} of the largest (allowed: "
            f"{MERGED:.0e}). Export them alone: --adapter-only."
        )
    return merged


def identity(tensor: Tensor) -> str:
    """A hash of a tensor's values and dtype."""
    return f"{tensor.dtype} {xxhash.xxh3_128(bytes_of(tensor.cpu().contiguous())).hexdigest()}"


def compare_folder(
    folder: Path,
    model: Any,
    identities: Mapping[str, str],
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> Comparison:
    """Opens a folder with plain transformers and compares it with llmtrain's own forward.

    Args:
        folder: what was written.
        model: the transformers model with the values that were written, in float32, on the CPU; it is used up.
        identities: name -> :func:`identity` of its state dict in the dtype that was written.
        dtype: that dtype.
        trust_remote_code: as the run had it.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    problems = [
        f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:6]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    ]
    opened = theirs.state_dict()
    if not problems and opened.keys() != identities.keys():
        problems = [f"other parameters: {sorted(opened.keys() ^ identities.keys())[:6]}"]
    if not problems:
        # Older versions of transformers open everything in float32: to there and back is exact.
        unequal = [
            name
            for name, value in opened.items()
            if identity(value.to(dtype) if value.is_floating_point() else value) != identities[name]
        ]
        problems = [f"tensors differ: {unequal[:6]} ({len(unequal)} in all)"] if unequal else []
    if problems:
        return Comparison(problems, float("nan"), float("nan"), 0, 0)
    return _same_answers(HFCausalLM(model).eval(), cast(theirs, torch.float32).eval())


def compare_adapters(folder: Path, source: "HFSource") -> Comparison:
    """Opens a folder of adapters with PEFT, on a new copy of the base model, and compares it with what was trained."""
    from transformers import AutoModelForCausalLM

    from llmtrain.hf_model.load import read_config

    cfg = source.config
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(
            cfg.pretrained_model_name_or_path, config=read_config(cfg), trust_remote_code=cfg.trust_remote_code
        )
        theirs = require_peft().PeftModel.from_pretrained(cast(base, torch.float32), str(folder)).eval()
    ours = HFCausalLM(cast(source.model, torch.float32), source.peft).eval()
    return _same_answers(ours, theirs.get_base_model())


def _same_answers(ours: HFCausalLM, theirs: Any) -> Comparison:
    ids, mask = prompts(theirs)
    real = mask.bool()
    with torch.inference_mode():
        wanted = ours(ids, attention_mask=mask).logits[real]
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if ours.takes_positions else {}
        found = theirs(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[real]
        tolerance = TOLERANCE * max(1.0, wanted.abs().max().item())
        difference = (wanted - found).abs().max().item()
        if not difference <= tolerance:  # a NaN is a difference, too
            problem = f"logits differ by {difference:.2e} (allowed: {tolerance:.2e})"
            return Comparison([problem], difference, tolerance, len(wanted), 0)
        equal, problem_or_none = _greedy(ours, theirs, ids[:1], tolerance)
    return Comparison([problem_or_none] if problem_or_none else [], difference, tolerance, len(wanted), equal)


def _greedy(ours: HFCausalLM, theirs: Any, prompt: Tensor, near: float) -> tuple[int, str | None]:
    """Equal greedy tokens of transformers' generate after a prompt (1, T), and the problem if they part.

    Where the two best logits are closer than twice the tolerance, either choice is right: the comparison ends there.
    """
    with quiet_transformers():
        whole = theirs.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
    logits = ours(whole).logits[0]
    start = prompt.shape[1]
    for position in range(start, whole.shape[1]):
        seen = logits[position - 1]
        best, token = int(seen.argmax()), int(whole[0, position])
        gap = (seen[best] - seen[token]).item()
        if best != token and gap <= 2 * near:
            return position - start, None
        if best != token:
            return position - start, f"greedy token {position - start + 1} differs: {token}, not {best} (by {gap:.2e})"
    return whole.shape[1] - start, None


def prompts(model: Any) -> tuple[Tensor, Tensor]:
    """Random token ids (3, T) and their mask, 0 on the left padding of the last row."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 10**6
    length = max(1, min(PROMPT_TOKENS, int(limit) - GREEDY_TOKENS))
    ids = torch.randint(int(config.vocab_size), (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, : length // 3] = 0
    return ids, mask
