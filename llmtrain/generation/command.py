"""``llmtrain generate``: prompts in, completions out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.errors import UserError
from llmtrain.generation.prompts import Completion, Prompt, gather_prompts, write_jsonl

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from llmtrain.generation.decoder import Progress
    from llmtrain.generation.sampling import Sampling


def generate_command(
    source: Path,
    prompts: Sequence[str] = (),
    *,
    prompts_file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    output: Path | None = None,
    recipe: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Completion]:
    """Continue prompts with a model and print what it writes.

    Args:
        source: A run, a checkpoint, a ``.pt`` file or an export.
        prompts: Texts; with none of them and no file, standard input is one prompt.
        prompts_file: ``.jsonl`` with a ``prompt`` in each object, or text with a prompt a line.
        max_new_tokens: Largest number of new tokens a prompt.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling, 1 is off.
        top_k: Keep the k most probable tokens, 0 is off.
        seed: The same seed gives the same text.
        batch_size: Prompts that run together; does not change what a prompt gets.
        output: A jsonl file for the results (in the order of the prompts); printed if None.
        recipe: For a checkpoint that does not carry its recipe.
        device: ``cpu``, ``cuda``; by default a GPU if there is one.
        dtype: By default bfloat16 on a GPU, float32 on the CPU.

    Returns:
        The completions, in the order of the prompts.

    Raises:
        UserError: a setting, a prompt file or the source is not usable.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 1.")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1.")
    wanted = gather_prompts(prompts, prompts_file)
    from llmtrain.generation.load import load
    from llmtrain.generation.prefill_progress import PrefillProgress
    from llmtrain.generation.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    model, tokenizer = load(source, recipe=recipe, device=device, dtype=dtype)
    done = []
    for completion in complete(
        model,
        tokenizer,
        wanted,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=PrefillProgress(),
    ):
        done.append(completion)
        if output is None:
            _print(completion)
    if output is not None:
        write_jsonl(output, done)
    return done


def complete(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Prompt],
    *,
    sampling: "Sampling",
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 8,
    progress: "Progress | None" = None,
) -> Iterator[Completion]:
    """Continue texts, batch by batch, in their order; `progress` is told how far long prompts have been read.

    An empty prompt stands for the start of a document: the model sees the end-of-text token, as it did in training.
    """
    from llmtrain.generation.decoder import decoder_for
    from llmtrain.generation.samples import sample

    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        samples = sample(
            decoder_for(model, progress),
            tokenizer,
            [prompt.text for prompt in part],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            first_index=start,
        )
        for prompt, completion in zip(part, samples, strict=True):
            yield replace(completion, prompt=prompt)


def _print(completion: Completion) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    text = Text(completion.prompt.text, style="dim")
    text.append(completion.text, style="bold" if console.is_terminal else "")
    console.print(text, soft_wrap=True)
    console.rule(style="dim")
