"""What one call of `llmtrain eval` does: from a recipe, or from arguments of the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.config.safe_yaml import YAMLMistake, read_yaml
from llmtrain.data.config import TextDatasetConfig
from llmtrain.data.finetuning.config import FinetuningLoaderConfig
from llmtrain.errors import UserError
from llmtrain.evaluation import source as sources
from llmtrain.evaluation.config import EvalRecipe, TextFilesLoader
from llmtrain.evaluation.evaluate import TOKENS_IN_A_BATCH
from llmtrain.evaluation.harness_config import HarnessConfig
from llmtrain.evaluation.icl.config import ICLConfig, ICLTaskConfig
from llmtrain.evaluation.recipe import is_eval_recipe, load_eval_recipe
from llmtrain.evaluation.source import RECIPES, Place
from llmtrain.evaluation.text import is_text
from llmtrain.evaluation.tokens import folder_of_shards
from llmtrain.recipe.recipe import FinetuningEvalLoader, TextEvalLoader

DTYPES = {"fp32": "float32", "amp_bf16": "bfloat16", "amp_fp16": "float16"}


@dataclass(frozen=True)
class TextFiles:
    """Plain text."""

    files: tuple[str, ...]
    """Files, folders and patterns."""
    column: str = "text"
    """Field of rows with the text."""


@dataclass(frozen=True)
class Data:
    """Data that one loss is measured on."""

    label: str | None
    """Its name in results; None where there is only one."""
    parts: Mapping[str, TextDatasetConfig | TextFiles] = field(default_factory=dict)
    """Key for messages -> shards or text; evaluated together, and each source by itself."""
    examples: FinetuningLoaderConfig | None = None
    """Conversations, instead of those."""


@dataclass(frozen=True)
class Plan:
    """What to do."""

    places: Sequence[Place]
    """The models."""
    data: Sequence[Data] | None
    """Data for losses; None is each model's own evaluation data."""
    lengths: Sequence[int] = ()
    """Tokens in a window; the model's own recipe says when there are none."""
    max_tokens: int | None = None
    """Of the text of each data."""
    subset: int | None = None
    """Rows of each data, instead."""
    batch_tokens: int = TOKENS_IN_A_BATCH
    """Tokens of a forward."""
    batch_size: int | None = None
    """Rows of a forward, instead."""
    harness: HarnessConfig | None = None
    """Tasks of lm-evaluation-harness."""
    icl: ICLConfig | None = None
    """llm-foundry's tasks."""
    shard: bool = False
    """Whether models are sharded over the ranks."""
    dtype: str | None = None
    """Of weights and computation."""
    seed: int = 17
    """Of what draws at random."""
    output: Path | None = None
    """Path of the results without suffix; beside the model when left out."""
    recipe: EvalRecipe | None = None
    """The evaluation recipe, where there is one."""
    notes: Sequence[str] = ()
    """Lines to say before the start."""

    @property
    def stem(self) -> Path:
        """Path of the results without suffix."""
        if self.output is not None:
            return self.output
        if self.recipe is None:
            return self.places[0].results
        if len(self.places) > 1:
            return Path("eval") / self.recipe.run_name
        own = self.places[0].results
        return own.with_name(f"{own.name}-{self.recipe.run_name}")


@dataclass(frozen=True)
class Arguments:
    """Of the command line; see `eval_command`."""

    data: Sequence[Path] = ()
    lengths: Sequence[int] = ()
    max_tokens: int | None = None
    batch_tokens: int = TOKENS_IN_A_BATCH
    output: Path | None = None
    recipe: Path | None = None
    dtype: str | None = None
    tasks: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    shard: bool = False


def make_plan(source: Path, overrides: Sequence[str], given: Arguments, device_type: str) -> Plan:
    """Find out what to do.

    Args:
        source: an evaluation recipe, a training recipe, a run, a checkpoint or an export.
        overrides: `key=value` of the recipe.
        given: the other arguments.
        device_type: `cpu` or `cuda`.

    Raises:
        UserError: a recipe or an argument has a mistake.
    """
    for key, value, least in (("max_tokens", given.max_tokens, 2), ("batch_tokens", given.batch_tokens, 1)):
        if value is not None and value < least:
            raise UserError(f"{key} {value}: must be at least {least}")
    if source.suffix in RECIPES and is_eval_recipe(source):
        return _from_recipe(load_eval_recipe(source, overrides), given, device_type)
    place = sources.find(source, given.recipe, overrides)
    harness, icl = _tasks(given, max(given.lengths, default=None))
    data: list[Data] | None = None
    if given.data:
        data = [Data(None, {f"--data {path}": _data_of(path) for path in given.data})]
    elif given.tasks:
        data = []
    return Plan(
        [place],
        data,
        lengths=sorted(set(given.lengths)),
        max_tokens=given.max_tokens,
        batch_tokens=given.batch_tokens,
        harness=harness,
        icl=icl,
        shard=given.shard,
        dtype=given.dtype,
        output=given.output,
    )


def own_data(place: Place) -> list[Data]:
    """What a model's own run evaluates on: text of all loaders together, conversations of each by themselves.

    Raises:
        UserError: nothing says what it is.
    """
    loaders = sources.evaluation_data(place)
    text = [loader for loader in loaders if isinstance(loader, TextEvalLoader)]
    parts = {f"eval_loader {loader.label}" if loader.label else "eval_loader": loader.dataset for loader in text}
    answers = [loader for loader in loaders if isinstance(loader, FinetuningEvalLoader)]
    several = len(answers) + bool(text) > 1
    found = [Data("text" if several else None, parts)] if text else []
    return found + [Data(loader.label or ("answers" if several else None), examples=loader) for loader in answers]


def _from_recipe(recipe: EvalRecipe, given: Arguments, device_type: str) -> Plan:
    unused = [name for name in ("data", "tasks", "num_fewshot", "limit", "recipe", "shard") if getattr(given, name)]
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"{options}: the evaluation recipe says what is evaluated. Change it there, or with KEY=VALUE")
    lengths = sorted(set(given.lengths or recipe.max_seq_len))
    data = []
    for index, loader in enumerate(recipe.eval_loader):
        key = f"eval_loader.{index}" if loader.label is None else f"eval_loader {loader.label}"
        if isinstance(loader, FinetuningEvalLoader):
            data.append(Data(loader.label, examples=loader))
        elif isinstance(loader, TextFilesLoader):
            data.append(Data(loader.label, {key: TextFiles(loader.files, loader.text_column)}))
        else:
            data.append(Data(loader.label, {key: loader.dataset}))
    batch, n_batches = recipe.device_eval_batch_size, recipe.eval_subset_num_batches
    fsdp = recipe.fsdp_config
    notes = recipe.notes()
    if device_type == "cpu" and recipe.precision != "fp32" and given.dtype is None:
        notes.append(f"precision: {recipe.precision} needs a GPU; on the CPU it is fp32.")
    if fsdp is not None and fsdp.sharding_strategy in ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"):
        notes.append(f"fsdp_config.sharding_strategy: {fsdp.sharding_strategy}: sharded over all ranks.")
    places = [sources.of_recipe(model, f"models.{index}") for index, model in enumerate(recipe.models)]
    names = [place.name for place in places]
    places = [
        replace(place, name=f"{place.name} ({names[: index + 1].count(place.name)})")
        if names.count(place.name) > 1
        else place
        for index, place in enumerate(places)
    ]
    return Plan(
        places,
        data,
        lengths=lengths,
        max_tokens=given.max_tokens or recipe.max_tokens,
        subset=None if n_batches < 0 else n_batches * (batch or 1),
        batch_tokens=given.batch_tokens,
        batch_size=batch,
        harness=recipe.harness,
        icl=recipe.icl,
        shard=fsdp is not None and fsdp.sharding_strategy != "NO_SHARD",
        dtype=given.dtype or (DTYPES[recipe.precision] if device_type == "cuda" else "float32"),
        seed=recipe.seed,
        output=given.output,
        recipe=recipe,
        notes=notes,
    )


def _data_of(path: Path) -> TextDatasetConfig | TextFiles:
    return TextFiles((str(path),)) if is_text(path) else folder_of_shards(path)


def _tasks(given: Arguments, longest: int | None) -> tuple[HarnessConfig | None, ICLConfig | None]:
    """Names of the harness's tasks, and files of llm-foundry's."""
    names: list[str] = []
    files: list[str] = []
    for task in (name.strip() for entry in given.tasks for name in entry.split(",")):
        (files if _has_icl_tasks(task) else names).append(task)
    if not names and not files and (given.num_fewshot is not None or given.limit is not None):
        raise UserError("--num-fewshot and --limit are for tasks: give some with --tasks")
    if files and given.limit is not None:
        raise UserError(f"--limit: {files[0]} has llm-foundry's tasks; a recipe limits them: icl_subset_num_batches")
    icl = harness = None
    try:
        if names:
            harness = HarnessConfig.model_validate(
                {
                    "tasks": names,
                    "num_fewshot": given.num_fewshot,
                    "limit": given.limit,
                    "batch_tokens": given.batch_tokens,
                }
            )
        if files:
            icl = ICLConfig.model_validate(
                {"icl_tasks": _read_all(files), **({} if longest is None else {"icl_seq_len": longest})}
            )
    except ValidationError as error:
        raise UserError("--tasks: " + "; ".join(str(each["msg"]) for each in error.errors())) from None
    if icl is not None and given.num_fewshot is not None:
        shots = {"num_fewshot": (given.num_fewshot,)}
        icl = icl.model_copy(update={"icl_tasks": tuple(task.model_copy(update=shots) for task in icl.icl_tasks)})
    return harness, icl


def _read_all(files: Sequence[str]) -> tuple[ICLTaskConfig, ...]:
    return tuple(task for file in files for task in ICLConfig.model_validate({"icl_tasks": file}).icl_tasks)


def _has_icl_tasks(name: str) -> bool:
    """Whether a task's name is the path of a YAML file in llm-foundry's format."""
    path = Path(name)
    if path.suffix not in RECIPES or not path.is_file():
        return False
    try:
        content: Any = read_yaml(path)
    except YAMLMistake:
        return True  # its loader says what is wrong with it
    return isinstance(content, dict) and "icl_tasks" in content
