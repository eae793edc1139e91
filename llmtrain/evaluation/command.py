"""`llmtrain eval`: loss and perplexity of a model on shards, at one length or at several, and loss by position."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.evaluation import source as sources
from llmtrain.evaluation.by_source import LossBySource
from llmtrain.evaluation.evaluate import (
    TOKENS_IN_A_BATCH,
    check_length,
    check_text,
    evaluate,
    n_targets,
    note_on_length,
)
from llmtrain.evaluation.report import AtLength, print_results, write_results
from llmtrain.evaluation.tokens import ShardTokens
from llmtrain.evaluation.windows import at_most
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.progress import progress


def eval_command(
    source: Path,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[Path] = (),
    lengths: Sequence[int] = (),
    max_tokens: int | None = None,
    batch_tokens: int = TOKENS_IN_A_BATCH,
    output: Path | None = None,
    recipe: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model, print a table, and write JSON, CSV and a picture.

    Args:
        source: a run, a checkpoint, a `.pt` file, an export, or a training recipe.
        overrides: `key=value` of the recipe, for its evaluation data.
        data: folders of shards, instead of the recipe's evaluation data.
        lengths: tokens in a window; the recipe's `max_seq_len`, or the shards' when there is no recipe.
        max_tokens: of the text, from its beginning; all of it when left out.
        batch_tokens: of a forward; does not change the results but for rounding.
        output: path of the results without suffix; in the run's folder `eval/` when left out.
        recipe: for a checkpoint that does not carry its recipe.
        device: `cpu`, `cuda`; a GPU if there is one.
        dtype: by default bfloat16 on a GPU, float32 on the CPU.
        console: where to; standard output when left out.

    Returns:
        What the JSON file holds.

    Raises:
        UserError: the model, the data or a length is not usable.
    """
    console = console or Console()
    for key, value, least in (("max_tokens", max_tokens, 2), ("batch_tokens", batch_tokens, 1)):
        if value is not None and value < least:
            raise UserError(f"{key} {value}: must be at least {least}")
    place = sources.find(source, recipe, overrides)
    model, tokenizer = sources.open_model(place, recipe, device, dtype)
    tokens, parts = sources.open_data(place, data, _vocab_size(model), tokenizer)
    wanted = sorted(set(lengths)) or [place.recipe.max_seq_len if place.recipe else parts[0].row_length]
    pieces = at_most(tokens.pieces, max_tokens)
    _check(model, parts, pieces, wanted)
    for length in wanted:
        if note := note_on_length(model, length):
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
    found = []
    total = n_targets(pieces)
    parameter = next(model.parameters())
    names = list(dict.fromkeys(tokens.sources))
    for length in wanted:
        start = time.monotonic()
        with progress(console, f"{length:,} tokens", total, "tokens") as advance:
            by_source = LossBySource(names, parameter.device) if len(names) > 1 else None
            losses = evaluate(
                model,
                tokens,
                length,
                max_tokens=max_tokens,
                batch_tokens=batch_tokens,
                advance=advance,
                by_source=by_source,
            )
        of_each = {} if by_source is None else by_source.results()
        found.append(AtLength(length, losses, time.monotonic() - start, of_each))
    about = {
        "source": place.name,
        "data": [name for part in parts for name in part.names],
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    written = write_results(output or place.results, about, found)
    print_results(console, found)
    console.print(f"written     {'  '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return {**about, "lengths": [one.as_dict() for one in found]}


def _check(
    model: MPT | HFCausalLM, parts: Sequence[ShardTokens], pieces: Sequence[int], lengths: Sequence[int]
) -> None:
    """All lengths before the first is computed: nobody waits for a result that a later length throws away."""
    for length in lengths:
        check_length(model, length)
    for part in parts:
        if not part.joined and max(lengths) > part.row_length:
            raise UserError(
                f"max_seq_len {max(lengths):,}: the rows of {', '.join(part.names)} have "
                f"{part.row_length:,} tokens and cannot be joined: they are of one document each (cut: documents), or "
                "were not made by llmtrain prep. Prepare longer rows"
            )
    for length in lengths:
        check_text(pieces, length)


def _vocab_size(model: MPT | HFCausalLM) -> int:
    if isinstance(model, MPT):
        return model.config.vocab_size
    return int(model.hf.get_input_embeddings().weight.shape[0])
