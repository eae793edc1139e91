"""`llmtrain data RECIPE`: what a fine-tuning recipe trains, token by token, without training."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.errors import UserError
from llmtrain.recipe.load import load_recipe


def show_command(recipe: Path, overrides: Sequence[str] = (), console: Console | None = None) -> None:
    """Print the first training batch of a recipe, decoded, and the counts of its data.

    The examples are tokenized if they were not before; the training run then finds them.

    Args:
        recipe: a training recipe with `train_loader.name: finetuning`.
        overrides: `key=value`.
        console: where to; standard output when left out.

    Raises:
        UserError: the recipe has another loader, or its data cannot be read.
    """
    loaded = load_recipe(recipe, overrides)
    loader = loaded.train_loader
    if not isinstance(loader, FinetuningLoaderConfig):
        raise UserError(
            f"{recipe}: train_loader.name is {loader.name!r}: all its tokens are trained. This shows fine-tuning data "
            "(name: finetuning)"
        )

    from llmtrain.data.finetuning.loader import build_finetuning_loader
    from llmtrain.data.finetuning.show import describe
    from llmtrain.tokenizer import load_tokenizer, with_chat_template

    logging.getLogger("llmtrain").setLevel(logging.WARNING)
    console = console or Console(highlight=False)
    for note in loader.dataset.notes():
        console.print(note, markup=False)
    tokenizer = with_chat_template(load_tokenizer(loaded.tokenizer))
    rows: int | None = getattr(loaded.model, "vocab_size", None)
    made = build_finetuning_loader(
        loader.model_copy(update={"num_workers": 0}),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer) if rows is None else rows,
        device_batch_size=loaded.global_train_batch_size,
    )
    console.print(describe(made, tokenizer), soft_wrap=True)
