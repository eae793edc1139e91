"""The recipe's tokenizer and loaders, as Composer takes them."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer import Evaluator
from composer.core import DataSpec

from llmtrain.data.batch import tokens_in_batch
from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.data.text import build_text_loader
from llmtrain.errors import UserError
from llmtrain.recipe.batch import BatchPlan
from llmtrain.recipe.recipe import LOSS_METRICS, Recipe
from llmtrain.tokenizer import fingerprint, load_tokenizer, with_chat_template
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.environment import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtrain.training.length_warmup import LengthWarmup

FIRST_BATCH = "first_batch.txt"


def open_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """The run's tokenizer; with a chat template when the run reads conversations.

    Raises:
        UserError: it cannot be opened, or has more ids than the model has embeddings.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    if recipe.finetuning_loaders():
        tokenizer = with_chat_template(tokenizer)
        rows, ids = vocabulary(recipe, tokenizer), len(tokenizer)
        if ids > rows:
            raise UserError(
                f"model.vocab_size: {rows:,} embeddings are too few for the {ids:,} ids of the tokenizer (the special "
                f"tokens of its chat template included). Set model.vocab_size={-(-ids // 128) * 128}; weights that are "
                "loaded grow to it."
            )
    return tokenizer


def vocabulary(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast") -> int:
    """Ids that may stand in a batch. Embeddings of a Hugging Face model grow to what the tokenizer has."""
    rows: int | None = getattr(recipe.model, "vocab_size", None)
    return len(tokenizer) if rows is None else rows


class Loaders:
    """Makes the loaders of a recipe. All ranks call its methods together.

    Args:
        recipe: the recipe.
        tokenizer: of `open_tokenizer`.
        batch: how the global batch is spread over ranks.
    """

    def __init__(self, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", batch: BatchPlan) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.batch = batch
        self.vocab_size = vocabulary(recipe, tokenizer)

    def train(self, warmup: "LengthWarmup | None" = None) -> DataSpec:
        """Training data; with `warmup` its sequences grow."""
        loader = self._build(
            self.recipe.train_loader,
            device_batch_size=self.batch.device_batch_size,
            epoch_batches=self.recipe.train_subset_num_batches,
        )
        if warmup is not None:
            return warmup.data_spec(loader)
        return DataSpec(loader, get_num_tokens_in_batch=tokens_in_batch)

    def evaluators(self) -> list[Evaluator]:
        """Evaluation data."""
        evaluators = []
        for label, cfg in self.recipe.evaluators().items():
            loader = self._build(cfg, device_batch_size=self.batch.device_eval_batch_size, evaluation=True)
            spec = DataSpec(loader, get_num_tokens_in_batch=tokens_in_batch)
            evaluators.append(
                Evaluator(
                    label=label,
                    dataloader=spec,
                    metric_names=list(LOSS_METRICS),
                    subset_num_batches=cfg.subset_num_batches,
                )
            )
        return evaluators

    def show(self, train: DataSpec, run: Path) -> None:
        """Prints what a fine-tuning run trains, decoded from its first batch; all of it goes to RUN/first_batch.txt."""
        if not isinstance(self.recipe.train_loader, FinetuningLoaderConfig):
            return

        from llmtrain.data.finetuning.show import describe

        def text() -> str:
            shown = describe(train.dataloader, self.tokenizer)
            temporary = run / f".{FIRST_BATCH}.writing"
            temporary.write_text(shown.full + "\n", encoding="utf-8")
            temporary.replace(run / FIRST_BATCH)
            return str(shown)

        say(from_rank_zero(text))

    def _build(self, cfg: TextLoaderConfig | FinetuningLoaderConfig, **how: Any) -> Any:
        how["sequence_parallel_degree"] = self.batch.sequence_parallel_degree
        if isinstance(cfg, FinetuningLoaderConfig):
            from llmtrain.data.finetuning.loader import build_finetuning_loader

            for note in cfg.dataset.notes():
                say(note)
            return build_finetuning_loader(cfg, tokenizer=self.tokenizer, vocab_size=self.vocab_size, **how)
        return build_text_loader(
            cfg,
            eos_token_id=self.tokenizer.eos_token_id,
            tokenizer_fingerprint=self._fingerprint,
            vocab_size=self.vocab_size,
            **how,
        )

    @cached_property
    def _fingerprint(self) -> str:
        """Of the tokenizer that shards were made with: without the tokens that this run adds."""
        return fingerprint(self.recipe.tokenizer.name)
