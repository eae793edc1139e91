"""Proof that an export is the same function: plain transformers opens it, and both models are asked the same.

Neither model is ever whole in memory when it is large: each is run block by block (`streamed.py`), one after the other.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import opened
from llmtrain.checkpoint.heap import give_back
from llmtrain.checkpoint.layouts import Layout
from llmtrain.checkpoint.streamed import Unit, streamed
from llmtrain.checkpoint.weights import Weights
from llmtrain.checkpoint.written import written_weights
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.quiet_transformers import quiet_transformers

TOLERANCE = 2e-5
"""Largest difference of logits in float32, for logits up to 1; larger logits may differ in proportion, because float32
has relative precision. Measured with 8 to 24 layers: 1.1e-6 to 1.6e-6 of the largest logit (docs/checkpoints.md)."""
GREEDY_TOKENS = 16
PROMPT_TOKENS = 64
WHOLE = 200_000_000
"""Up to so many bytes in float32 a model is opened with ``from_pretrained``, as users do it; above, block by block."""
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


@dataclass(frozen=True)
class Answers:
    """What transformers says to the prompts."""

    padded: Tensor
    """Logits (rows, T, vocab_size) under the mask."""
    unpadded: Tensor
    """Logits of the rows without padding, asked without a mask."""
    tokens: Tensor
    """What ``generate`` wrote behind the prompts, (rows, up to GREEDY_TOKENS)."""
    ends: set[int]
    """Tokens at which it stops."""


def compare_with_transformers(
    folder: Path, layout: Layout, config: MPTConfig, weights: Weights, tokenizer: Path | None
) -> Comparison:
    """Open a Hugging Face folder with plain transformers (no network, no code but ours) and compare it with our model.

    Checked in this order, stopping at the first kind that fails: the class that transformers picks; no missing,
    unexpected or misshaped keys; every tensor bitwise equal to ``weights``; logits in float32, with and without left
    padding; greedy tokens, generated with transformers' own cache.

    Memory: a few copies of the prompts' logits, and of weights in float32 no more than the largest block, embedding or
    head; up to WHOLE bytes the whole model twice.

    Args:
        folder: What was written.
        layout: As what it was written.
        config: Of our model.
        weights: By MPT's names, in the dtype that was written.
        tokenizer: Folder of the tokenizer, for a prompt of real text; None leaves random ids only.

    Raises:
        UserError: transformers picks another class than the layout's.
    """
    if not opened.is_our_code(folder, layout):
        return _different(["the folder holds code that is not llmtrain's; it was not opened"])
    written = written_weights(folder)
    theirs = opened.without_weights(folder, layout)
    problems = opened.key_problems(theirs, written.shapes())
    problems = problems or _differing_tensors(written, layout.weights(config, weights))
    whole = 4 * sum(map(math.prod, written.shapes().values())) <= WHOLE
    if whole and not problems:
        theirs, problems = opened.with_weights(folder, layout)
    if problems:
        return _different(problems)
    ids, mask = _prompts(config, tokenizer)
    with torch.inference_mode():
        if whole:
            answers = _ask(theirs.float(), ids, mask, config)
        else:
            with _their_weights(theirs, layout, written):
                answers = _ask(theirs, ids, mask, config)
        del theirs
        return _judge(answers, _our_logits(config, weights, answers, ids, mask, whole), mask)


def _different(problems: list[str]) -> Comparison:
    return Comparison(problems, float("nan"), float("nan"), 0, 0)


def _differing_tensors(written: Weights, wanted: Weights) -> list[str]:
    if missing := [name for name in wanted if name not in written]:
        return [f"not written: {missing[:6]}"]
    differing = []
    for name in wanted:
        value, found = wanted[name], written[name]
        if value.dtype != found.dtype or not torch.equal(value, found):
            differing.append(name)
        del value, found
        give_back()
    return [f"tensors differ: {differing[:6]} ({len(differing)} in all)"] if differing else []


def _prompts(config: MPTConfig, tokenizer: Path | None) -> tuple[Tensor, Tensor]:
    """Token ids (rows, T) and a mask of the same shape, False on left padding, which the last row has."""
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


@contextlib.contextmanager
def _their_weights(theirs: Any, layout: Layout, written: Weights) -> Iterator[None]:
    tied, table = opened.tied_head(theirs), opened.embedding(theirs)
    with streamed(theirs, layout.blocks, lambda name: written[table if name == tied else name]):
        yield


def _ask(theirs: Any, ids: Tensor, mask: Tensor, config: MPTConfig) -> Answers:
    full = mask.all(dim=1)
    padded = theirs(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    unpadded = theirs(input_ids=ids[full], use_cache=False).logits
    count = min(GREEDY_TOKENS, config.max_seq_len - ids.shape[1])
    tokens = ids[:, :0]
    settings = theirs.generation_config
    if count > 0:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wonders at the meta device
            sequence = theirs.generate(
                input_ids=ids,
                attention_mask=mask.long(),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=settings.pad_token_id or 0,
            )
        tokens = sequence[:, ids.shape[1] :]
    ends = settings.eos_token_id
    return Answers(padded, unpadded, tokens, set(ends if isinstance(ends, list) else [ends]) - {None})


def _our_logits(
    config: MPTConfig, weights: Weights, answers: Answers, ids: Tensor, mask: Tensor, whole: bool
) -> Tensor:
    """Logits (rows, T + generated, vocab_size) of our model for the prompts and transformers' answers: one forward.

    At each token of an answer it says which token our model would have chosen there.
    """
    ids = torch.cat([ids, answers.tokens], dim=1)
    mask = torch.cat([mask, torch.ones_like(answers.tokens, dtype=torch.bool)], dim=1)
    ours = MPT(config, device="meta").eval()
    if whole:
        ours.load_state_dict({name: weights[name].float() for name in weights}, strict=True, assign=True)
        return ours(ids, attention_mask=mask).logits  # type: ignore[no-any-return]
    if config.tie_word_embeddings:  # then the head is no module that is called: its weight is read behind the last norm
        head = Unit("transformer.wte", ours.transformer.wte, weights.__getitem__)
        ours.transformer.register_forward_hook(head.before)
        ours.register_forward_hook(head.after)
    with streamed(ours, "transformer.blocks", weights.__getitem__):
        return ours(ids, attention_mask=mask).logits  # type: ignore[no-any-return]


def _judge(answers: Answers, wanted: Tensor, mask: Tensor) -> Comparison:
    length = mask.shape[1]
    pairs = (wanted[:, :length][mask], answers.padded[mask]), (wanted[mask.all(dim=1), :length], answers.unpadded)
    tolerance = TOLERANCE * max(1.0, pairs[0][0].abs().max().item())
    differences = [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    difference = max(differences, key=lambda d: math.inf if math.isnan(d) else d)
    positions = sum(ours.shape[:-1].numel() for ours, _ in pairs)
    if not difference <= tolerance:  # a NaN is a difference, too
        apart = f"logits differ by {difference:.2e} (allowed: {tolerance:.2e})"
        return Comparison([apart], difference, tolerance, positions, 0)
    counts, problems = 0, []
    for row, tokens in zip(wanted[:, length - 1 :], answers.tokens.tolist(), strict=True):
        equal, problem = _greedy_agrees(row, tokens, answers.ends, tolerance)
        counts += equal
        problems += [problem] if problem else []
    return Comparison(problems, difference, tolerance, positions, counts)


def _greedy_agrees(logits: Tensor, answer: list[int], ends: set[int], near: float) -> tuple[int, str | None]:
    """Number of an answer's tokens that are our model's greedy choice, and the problem if one is not.

    Where the two best logits are closer than twice the tolerance, either choice is right: the comparison ends there.

    Args:
        logits: (answer + 1, vocab_size), of the last token of the prompt and of each token of the answer.
        answer: Token ids; what follows one of `ends` is padding.
        ends: Tokens that end a generation.
        near: The tolerance.
    """
    for position, token in enumerate(answer):
        best = int(logits[position].argmax())
        if best != token:
            gap = (logits[position, best] - logits[position, token]).item()
            if gap <= 2 * near:
                return position, None
            return (
                position,
                f"greedy token {position + 1} after a prompt differs: {token} instead of {best} (by {gap:.2e})",
            )
        if token in ends:
            return position + 1, None
    return len(answer), None
