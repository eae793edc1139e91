"""Proof that an export is the same function: plain transformers opens it, and both models are asked the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.quiet_transformers import quiet_transformers

TOLERANCE = 2e-5
"""Largest difference of logits in float32, for logits up to 1; larger logits may differ in proportion, because float32
has relative precision. Measured with 8 to 24 layers: 1.1e-6 to 1.6e-6 of the largest logit (docs/checkpoints.md)."""
GREEDY_TOKENS = 16
PROMPT_TOKENS = 64
_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the Moon while a third kept the ship.\n"
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
)


@dataclass(frozen=True)
class Comparison:
    """What was compared, and how far it is apart."""

    problems: list[str]
    """One line each; empty when the export is the same function."""
    max_difference: float
    """Largest absolute difference of logits in float32, over all prompts."""
    tolerance: float
    """What was allowed for the size of these logits."""
    positions: int
    """Positions whose logits were compared (the whole vocabulary at each)."""
    tokens: int
    """Greedy tokens that are equal."""


def compare_with_transformers(
    folder: Path, config: MPTConfig, weights: Mapping[str, Tensor], tokenizer: Path | None
) -> Comparison:
    """Open a Hugging Face folder with plain transformers (no remote code, no network) and compare it with our model.

    Checked in this order, stopping at the first kind that fails: no missing, unexpected or misshaped keys; every tensor
    bitwise equal to ``weights``; logits in float32, with and without left padding; greedy tokens.

    Args:
        folder: What was written.
        config: Of our model.
        weights: By MPT's names, in the dtype that was written.
        tokenizer: Folder of the tokenizer, for a prompt of real text; None leaves random ids only.
    """
    theirs, problems = _open(folder)
    problems = problems or _differing_tensors(theirs, weights, config)
    if problems:
        return Comparison(problems, float("nan"), float("nan"), 0, 0)
    theirs = theirs.float().eval()
    ours = MPT(config, device="meta")
    ours.load_state_dict({name: value.float() for name, value in weights.items()}, strict=True, assign=True)
    ours.eval()
    ids, mask = _prompts(config, tokenizer)
    with torch.inference_mode():
        wanted = ours(ids, attention_mask=mask).logits[mask]
        found = theirs(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[mask]
        tolerance = TOLERANCE * max(1.0, wanted.abs().max().item())
        difference = (wanted - found).abs().max().item()
        if not difference <= tolerance:  # a NaN is a difference, too
            problems = [f"logits differ by {difference:.2e} (allowed: {tolerance:.2e})"]
            return Comparison(problems, difference, tolerance, len(wanted), 0)
        tokens = 0
        for row, seen in zip(ids, mask, strict=True):
            equal, problem = _greedy_agrees(ours, theirs, row[seen][None], config, tolerance)
            tokens += equal
            problems += [problem] if problem else []
    return Comparison(problems, difference, tolerance, len(wanted), tokens)


def _open(folder: Path) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        # No dtype here: its name differs between transformers 4 and 5, and both casts to float32 are exact.
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            problems.append(f"transformers reports {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:6]}")
    return theirs, problems


def _differing_tensors(theirs: Any, weights: Mapping[str, Tensor], config: MPTConfig) -> list[str]:
    opened = theirs.state_dict()
    if config.tie_word_embeddings:
        head = opened.pop("lm_head.weight")
        if not torch.equal(head, opened["transformer.wte.weight"]):
            return ["lm_head.weight is not tied to transformer.wte.weight"]
    if opened.keys() != weights.keys():
        return [f"other parameters: {sorted(opened.keys() ^ weights.keys())[:6]}"]
    # Older versions of transformers open everything in float32: the cast from a narrower dtype is exact.
    differing = [name for name, value in weights.items() if not torch.equal(opened[name].float(), value.float())]
    return [f"tensors differ: {differing[:6]} ({len(differing)} in all)"] if differing else []


def _prompts(config: MPTConfig, tokenizer: Path | None) -> tuple[Tensor, Tensor]:
    """Token ids (rows, T) and a mask of the same shape, False on left padding."""
    # transformers' MPT fails beyond max_seq_len, so prompt and answer must fit into it.
    length = max(1, min(PROMPT_TOKENS, config.max_seq_len - GREEDY_TOKENS))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (3, length), generator=generator)
    if tokenizer is not None:
        from llmtrain.tokenizer import load_raw

        text = load_raw(str(tokenizer)).encode(_TEXT, add_special_tokens=False).ids
        if text:
            rows[0] = torch.tensor((text * length)[:length])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[2, : length // 3] = False
    return rows, mask


def _greedy_agrees(ours: MPT, theirs: Any, prompt: Tensor, config: MPTConfig, near: float) -> tuple[int, str | None]:
    """Number of equal greedy tokens after a prompt (1, T), and the problem if they part.

    Where the two best logits are closer than twice the tolerance, either choice is right: the comparison ends there.
    """
    count = min(GREEDY_TOKENS, config.max_seq_len - prompt.shape[1])
    if count < 1:
        return 0, None
    with quiet_transformers():
        sequence = theirs.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=theirs.generation_config.pad_token_id or 0,
        )
    answer = sequence[0, prompt.shape[1] :].tolist()
    cache, ids = KVCache(config.n_layers), prompt
    seen = torch.ones_like(prompt, dtype=torch.bool)
    for position, token in enumerate(answer):
        logits = ours(ids, attention_mask=seen, cache=cache).logits[0, -1]
        best = int(logits.argmax())
        if best != token:
            gap = (logits[best] - logits[token]).item()
            if gap <= 2 * near:
                return position, None
            return (
                position,
                f"greedy token {position + 1} after a prompt differs: {token} instead of {best} (by {gap:.2e})",
            )
        ids = torch.tensor([[token]])
        seen = torch.cat([seen, torch.ones(1, 1, dtype=torch.bool)], dim=1)
    return len(answer), None
