"""Samples from fixed prompts, also from a sharded model in the middle of training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.generation.conversation import decode, encode, render
from llmtrain.generation.decoder import Decoder
from llmtrain.generation.generate import generate
from llmtrain.generation.prompts import Completion, Prompt
from llmtrain.generation.sampling import Sampling
from llmtrain.stop_tokens import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SamplePrompt = str | Sequence[Mapping[str, str]]
"""Text to continue, or the messages of a conversation to answer."""


def sample(
    model: nn.Module | Decoder,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[SamplePrompt],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    first_index: int = 0,
) -> list[Completion]:
    """One completion of each prompt, as one batch.

    Where there are several ranks, all of them call this with the same arguments: a sharded model gathers its weights in
    each forward, so no rank may stop earlier than the others. They go on with the tokens of rank 0.

    Args:
        model: In evaluation mode; with FSDP the module that was sharded as the root.
        tokenizer: With a chat template if there are conversations among the prompts.
        prompts: Texts and conversations.
        max_new_tokens: Largest number of new tokens of each.
        sampling: Greedy by default.
        seed: The same seed gives the same samples; the global random state is not touched.
        first_index: Index of the first prompt, when the prompts are a part of a longer list.

    Raises:
        UserError: a conversation without a template, or a prompt too long for the model's learned positions.
    """
    # An empty text stands for the start of a document.
    texts = [prompt if isinstance(prompt, str) else render(tokenizer, prompt) for prompt in prompts]
    ids = [encode(tokenizer, text) or [int(tokenizer.eos_token_id)] for text in texts]
    stops = stop_ids(tokenizer)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    answers = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=stops,
        seed=seed,
        first_index=first_index,
        agree=_as_rank_zero if several else None,
    )
    return [
        Completion(Prompt(text), decode(tokenizer, tokens), tokens, tokens[-1] in stops)
        for text, tokens in zip(texts, answers, strict=True)
    ]


def _as_rank_zero(tokens: Tensor) -> Tensor:
    """A tie that two devices break differently would otherwise end in ranks that wait for each other."""
    tokens = tokens.contiguous()
    dist.broadcast(tokens, src=0)
    return tokens
