"""``llmtrain generate``: prompts in, completions out; to the screen, or as a job from a file to a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import UserError
from llmtrain.generation.job import Job
from llmtrain.generation.requests import Requests, standard_input
from llmtrain.generation.settings import Settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from llmtrain.generation.batch import Answer, Answering
    from llmtrain.generation.requests import Request


def generate_command(
    source: Path,
    prompts: Sequence[str] = (),
    *,
    prompts_file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
    output: Path | None = None,
    overwrite: bool = False,
    recipe: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> "list[Answer]":
    """Continue prompts with a model and print what it writes, or write it to a file.

    Args:
        source: A run, a checkpoint, a ``.pt`` file or an export.
        prompts: Texts; with none of them and no file, standard input is one prompt.
        prompts_file: ``.jsonl`` with a request in each line (:mod:`llmtrain.generation.requests`), or text with a
            prompt a line.
        max_new_tokens: Largest number of new tokens a prompt, where a request does not say; so the next four.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling, 1 is off.
        top_k: Keep the k most probable tokens, 0 is off.
        stop: Texts that end an answer.
        seed: The same seed gives the same text.
        batch_size: Prompts that run together; does not change what a prompt gets, but for rounding.
        output: A jsonl file for the results (in the order of the requests); printed if None. Interrupted, the same
            command goes on where it was (:mod:`llmtrain.generation.job`).
        overwrite: Replace an output of something else.
        recipe: For a checkpoint that does not carry its recipe.
        device: ``cpu``, ``cuda``; by default a GPU if there is one.
        dtype: By default bfloat16 on a GPU, float32 on the CPU.

    Returns:
        What was printed, in the order of the prompts.

    Raises:
        UserError: a setting, a request, the source or the output is not usable.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1.")
    settings = Settings(max_new_tokens, temperature, top_p, top_k, stop=tuple(stop))
    if output is not None and prompts_file is not None and output.resolve() == prompts_file.resolve():
        raise UserError(f"--output {output} is the file with the prompts.")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.absolute().parent}.")
    texts = list(prompts) if prompts or prompts_file is not None else standard_input()
    requests = Requests(texts, prompts_file, settings)
    from llmtrain.generation.batch import Answering
    from llmtrain.generation.load import load
    from llmtrain.generation.prefill_progress import PrefillProgress

    model, tokenizer = load(source, recipe=recipe, device=device, dtype=dtype)
    answering = Answering(model, tokenizer, seed=seed, batch_size=batch_size, progress=PrefillProgress())
    if output is not None:
        made_of = {
            **_identity(model, tokenizer),
            "input": requests.sha256,
            "seed": seed,
            "batch_size": batch_size,
            **vars(settings),
            "stop": list(settings.stop),
        }
        _run_job(Job(output, made_of, {"model": str(source)}), requests, answering, overwrite)
        return []
    answering.check(requests)
    printed: list[Answer] = []
    for request, answers in answering.answer(requests):
        for prompt, answer in zip(request.prompts, answers, strict=True):
            _print(prompt if isinstance(prompt, str) else prompt[-1]["content"] + "\n", answer, request)
        printed += answers
    return printed


def _run_job(job: Job, requests: Requests, answering: "Answering", overwrite: bool) -> None:
    from rich.console import Console

    from llmtrain.generation.batch import as_json
    from llmtrain.generation.batch_progress import batch_progress

    console, output = Console(stderr=True), job.output
    done = job.start(overwrite=overwrite)
    if done is None:
        console.print(
            f"{output} is complete already, of the same input, model and settings.", markup=False, soft_wrap=True
        )
        return
    if done:
        said = f"{output}: {done:,} of {requests.n:,} requests are answered; going on."
        console.print(said, markup=False, soft_wrap=True)
    else:
        answering.check(requests)
    before = sum(len(request.prompts) for number, request in enumerate(requests) if number < done)
    with job.writing() as file, batch_progress(console, before, requests.n_prompts) as tell:
        for request, answers in answering.answer(requests, done=done, tell=tell):
            file.write(json.dumps(as_json(request, answers), ensure_ascii=False) + "\n")
            file.flush()


def _identity(model: "nn.Module", tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """What tells a loaded model from others: a hash over its weights as they compute, wherever they came from."""
    import torch
    import xxhash

    from llmtrain.tokenizer import fingerprint_of

    digest = xxhash.xxh3_128()
    weights = model.state_dict()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}")
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    first = next(iter(weights.values()))
    return {
        "weights": digest.hexdigest(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": first.device.type,
        "tokenizer": fingerprint_of(tokenizer),
        "chat_template": xxhash.xxh3_64(str(tokenizer.chat_template)).hexdigest(),
    }


def _print(prompt: str, answer: "Answer", request: "Request") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    text = Text("" if request.settings.return_full_text else prompt, style="dim")
    text.append(answer.text, style="bold" if console.is_terminal else "")
    console.print(text, soft_wrap=True)
    console.rule(style="dim")
