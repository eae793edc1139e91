"""What a data recipe with `task: finetuning` may say."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llmtrain.prep.config import DataRecipe, SourcePlace, check_sources


class ConversationSource(SourcePlace):
    """A source of conversations, or of prompts and responses."""

    format: Literal["auto", "python_docstrings", "python_doctests"] = "auto"
    """`auto`: rows of .jsonl, .json, .csv or .parquet files (`.gz`, `.zst` are decompressed), or of the dataset.
    `python_docstrings`: of Python files, a question about each public function, class and method, answered by the
    first paragraph of its docstring. `python_doctests`: of Python files, the examples in docstrings: code, and what it
    prints."""
    preprocessing_fn: str | dict[str, str] | None = None
    """Brings rows into a known shape: a registered name, `package.module:function`, or a mapping of columns."""
    safe_load: bool = False
    """Take only data files from `hf_name`; anything else there is an error."""
    into: Literal["train", "val"] | None = None
    """Split that the whole source goes to; null divides it by `val_fraction`."""
    max_examples: int | None = Field(default=None, gt=0)
    """Stop after this many good examples; duplicates do not count."""

    @model_validator(mode="after")
    def _format_fits(self) -> Self:
        if self.format != "auto" and (self.files is None or self.preprocessing_fn is not None):
            raise ValueError(f"format: {self.format} reads Python files: give files, and no preprocessing_fn")
        if self.safe_load and self.hf_name is None:
            raise ValueError("safe_load needs hf_name")
        return self


class ConversationRecipe(DataRecipe):
    """Conversations of any source to MDS shards: one column `messages`, or two, `prompt` and `response`.

    The shards hold text: which tokenizer and chat template make tokens of it is the training recipe's choice.
    """

    task: Literal["finetuning"]
    """What the shards are for."""
    sources: list[ConversationSource] = Field(min_length=1)
    """Read in this order."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share that goes to `val` instead of `train`: decided by a hash of the first question (of the function's name for
    the Python formats), so that whatever answers one question is on one side."""
    strict: bool = False
    """A malformed row is an error; otherwise it is dropped and counted."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        check_sources(self.sources, self.split_by_source)
        return self

    def splits_of(self, source: ConversationSource) -> tuple[str, ...]:
        """The splits that a source is written to."""
        if source.into is not None:
            return (source.into,)
        return ("train", "val") if self.val_fraction else ("train",)
