"""The evaluation recipe: every key that a YAML file for `llmtrain eval` may have. Names are llm-foundry's. Light."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from llmtrain.config.base import Config, mistake
from llmtrain.evaluation.harness_config import HarnessConfig
from llmtrain.evaluation.icl.config import Gauntlet, ICLConfig, Tasks, refuse_repeated
from llmtrain.recipe.recipe import (
    FinetuningEvalLoader,
    ModelConfig,
    TextEvalLoader,
    refuse_fp8,
    refuse_odd_name,
    refuse_same_labels,
)
from llmtrain.tokenizer import TokenizerConfig
from llmtrain.training.fsdp import FSDPConfig


def _as_list(value: Any) -> Any:
    return () if value is None else [value] if isinstance(value, Mapping | str | int) else value


class TextFilesLoader(Config):
    """Plain text to evaluate on, tokenized by each model's own tokenizer. llmtrain's own."""

    name: Literal["text_files"]
    """Which loader."""
    files: Annotated[tuple[str, ...], BeforeValidator(_as_list)]
    """Files, folders (every file below that is text), or patterns: `.txt` and other text is a document a file, `.jsonl`
    and `.parquet` a document a row."""
    text_column: str = "text"
    """Of rows: the field with the text."""
    label: str | None = None
    """Name of it; needed when there are several loaders."""


EvalData = Annotated[TextEvalLoader | FinetuningEvalLoader | TextFilesLoader, Field(discriminator="name")]
"""What may stand under `eval_loader`."""


class ModelToEvaluate(Config):
    """One of `models`."""

    model_name: str | None = None
    """Its column in tables; the run and checkpoint when left out."""
    load_path: str | None = None
    """A run, a checkpoint, a `.pt` file, a Hugging Face folder, a hub name or a folder in an object store. Not needed
    for `model.name: hf_causal_lm`, which names its weights itself."""
    model: ModelConfig | None = None
    """The model, for weights that do not say what they are (other trainers' checkpoints). Where they do, what stands
    here must agree; keys that do not change the function (`attn_config.attn_impl`) are taken."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer, where none lies beside the weights or another is wanted."""

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        named = getattr(self.model, "pretrained_model_name_or_path", None) or getattr(self.model, "pretrained", None)
        if self.load_path is None and not named:
            raise mistake("Nothing says where the weights are. Give a run, a checkpoint or an export.", "load_path")
        return self


class EvalRecipe(Config):
    """An evaluation: of one model or several, by losses on data and by tasks."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "icl_tasks_str": "Write the path under `icl_tasks`.",
        "eval_gauntlet_str": "Write the path under `eval_gauntlet`.",
        "eval_loaders": "The key is `eval_loader`; it takes one loader or a list.",
        "device_train_microbatch_size": "The key is `device_eval_batch_size`.",
        "max_duration": "This is a key of a training recipe; an evaluation has none.",
        "tasks": "Tasks of lm-evaluation-harness stand under `harness.tasks`, llm-foundry's under `icl_tasks`.",
        "limit": "It belongs in `harness.limit`.",
        "num_fewshot": "It belongs in `harness.num_fewshot`.",
        "data": "Give `eval_loader`: `{name: text, dataset: {local: ...}}` or `{name: text_files, files: ...}`.",
        "tp_config": "Tensor parallelism is not built. Shard with `fsdp_config`.",
        "parallelism_config": "Write `fsdp_config`.",
        "global_seed": "It is called `seed` now; for interpolation put it under `variables`.",
        "models.*.num_beams": "Beam search is not supported. Remove it.",
    }

    models: tuple[ModelToEvaluate, ...]
    """The models, each a column of the table. One alone may stand at the top instead: `model`, `tokenizer`,
    `load_path`, `model_name`."""
    max_seq_len: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_list)]
    """Tokens in a window; a list evaluates the same text at several lengths. (llm-foundry takes one number.)"""
    device_eval_batch_size: PositiveInt | None = None
    """Samples of one forward on one device. Does not change the results but for rounding."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """dtype of weights and computation on a GPU. On the CPU it is always fp32."""
    seed: int = Field(default=17, ge=0, lt=2**32)
    """Seeds what draws at random: few-shot examples, sampled answers."""
    run_name: str = ""
    """Names the files with the results. When left out: the environment variable RUN_NAME, else the recipe's file."""

    # Losses
    eval_loader: Annotated[tuple[EvalData, ...], BeforeValidator(_as_list)] = ()
    """Data for loss, perplexity and bits per byte: one loader, or a list of them with a `label` each."""
    eval_subset_num_batches: int = Field(default=-1, ge=-1)
    """Batches of `device_eval_batch_size` windows of each loader, over all ranks; -1 is all."""
    max_tokens: PositiveInt | None = Field(default=None, ge=2)
    """Tokens of each loader's text, from its beginning; all when left out. (llmtrain's own.)"""

    # Tasks
    icl_tasks: Tasks = ()
    """llm-foundry's tasks: a list, or the path of a YAML file with one."""
    icl_seq_len: PositiveInt | None = None
    """Tokens of question and answer, for tasks that do not say; the longest max_seq_len when left out."""
    icl_subset_num_batches: int = Field(default=-1, ge=-1)
    """Batches of each of these tasks; -1 is all."""
    eval_gauntlet: Gauntlet = None
    """llm-foundry's averages over tasks: a block, or the path of a YAML file with one."""
    harness: HarnessConfig | None = None
    """Tasks of EleutherAI's lm-evaluation-harness (extra `eval`). (llmtrain's own.)"""

    # Ranks
    fsdp_config: FSDPConfig | None = None
    """Shard the model over the ranks. Without it every rank holds the whole model."""
    dist_timeout: PositiveFloat = 1800.0
    """Seconds that a rank waits for the others."""

    # Accepted, so that old recipes run
    loggers: dict[str, Any] | None = None
    """Has no effect: results are files (`notes` says so)."""
    callbacks: dict[str, Any] | None = None
    """Has no effect: they belong to training."""
    console_log_interval: str | int = "1ba"
    """Has no effect: progress is shown every few seconds."""
    progress_bar: bool = False
    """Has no effect: there is one on a terminal."""
    log_config: bool = True
    """Has no effect: the recipe always stands in the JSON file."""
    python_log_level: str | None = None
    """Least severe messages of Python's loggers that are shown."""
    metadata: dict[str, Any] | None = None
    """Free-form, kept with the results."""
    code_paths: tuple[str, ...] | None = None
    """Python files that are run before anything else. A recipe with them is code."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Free-form: values for interpolation (`${variables.x}`)."""

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp8(cls, value: Any) -> Any:
        return refuse_fp8(value)

    @field_validator("run_name")
    @classmethod
    def _is_a_file_name(cls, value: str) -> str:
        return refuse_odd_name(value, "files")

    @field_validator("models", "max_seq_len")
    @classmethod
    def _at_least_one(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("It is empty: give at least one.")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        refuse_same_labels([loader.label for loader in self.eval_loader])
        for index, loader in enumerate(self.eval_loader):
            if getattr(loader, "subset_num_batches", None) is not None:
                raise mistake(
                    "It is a key of training recipes. Here all loaders share `eval_subset_num_batches`.",
                    f"eval_loader.{index}.subset_num_batches",
                )
        names = [model.model_name for model in self.models]
        for index, name in enumerate(names):
            if name is not None and name in names[:index]:
                raise mistake("Two models have this name.", f"models.{index}.model_name")
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> Self:
        refuse_repeated(self.icl_tasks)
        if self.eval_gauntlet is not None and not self.icl_tasks:
            raise mistake("It averages over tasks, and there are none: give `icl_tasks`.", "eval_gauntlet")
        return self

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not self.eval_loader and not self.icl_tasks and self.harness is None:
            raise mistake(
                "Nothing to evaluate: give data (`eval_loader`) or tasks (`harness`, `icl_tasks`).", "eval_loader"
            )
        return self

    @property
    def icl(self) -> ICLConfig | None:
        """llm-foundry's tasks as their engine takes them; None without any."""
        if not self.icl_tasks:
            return None
        return ICLConfig(
            icl_tasks=self.icl_tasks,
            eval_gauntlet=self.eval_gauntlet,
            icl_seq_len=self.icl_seq_len or max(self.max_seq_len),
            icl_subset_num_batches=self.icl_subset_num_batches,
            **({} if self.device_eval_batch_size is None else {"device_eval_batch_size": self.device_eval_batch_size}),
        )

    def notes(self) -> list[str]:
        """One line for every key that asks for something that does not exist here."""
        lines = [] if self.fsdp_config is None else list(self.fsdp_config.notes())
        for key in ("loggers", "callbacks"):
            if getattr(self, key):
                lines.append(f"{key}: has no effect on an evaluation; the results are files (JSON, CSV, PNG).")
        return lines
