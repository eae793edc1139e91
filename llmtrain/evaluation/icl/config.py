"""llm-foundry's `icl_tasks` and `eval_gauntlet`. Light.

Keys, defaults and meanings are those of its `build_icl_evaluators` and `EvalGauntlet`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from llmtrain.config.base import Config, mistake
from llmtrain.config.load import load

TaskType = Literal["language_modeling", "multiple_choice", "schema", "generation_task_with_answers"]

LM_ACCURACY = "InContextLearningLMAccuracy"
MC_ACCURACY = "InContextLearningMultipleChoiceAccuracy"
EXACT_MATCH = "InContextLearningGenerationExactMatchAccuracy"
LM_ECE = "InContextLearningLMExpectedCalibrationError"
MC_ECE = "InContextLearningMCExpectedCalibrationError"

METRICS: Mapping[str, tuple[str, ...]] = {
    "language_modeling": (LM_ACCURACY, LM_ECE),
    "multiple_choice": (MC_ACCURACY, MC_ECE),
    "schema": (MC_ACCURACY, MC_ECE),
    "generation_task_with_answers": (EXACT_MATCH,),
}
"""The metrics of each type of task; the first is what it has when nothing is said."""

_OLD_METRICS = {
    "InContextLearningQAAccuracy": EXACT_MATCH,
    "InContextLearningGenerationAccuracy": EXACT_MATCH,
    "InContextLearningExpectedCalibrationError": None,
}
_OLD_TYPES = {"question_answering": "generation_task_with_answers", "qa": "generation_task_with_answers"}


_T = TypeVar("_T")


def _filled(value: tuple[_T, ...]) -> tuple[_T, ...]:
    # Not min_length: pydantic would report it, too, where one of the items is wrong.
    if not value:
        raise ValueError("It is empty: give at least one.")
    return value


NotEmpty = Annotated[tuple[_T, ...], AfterValidator(_filled)]


class ICLGenerationConfig(Config):
    """How an answer is generated. Greedy when nothing is said."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "num_return_sequences": "One answer a question is scored. Remove it.",
        "stopping_criteria": "Use the task's `early_stopping_criteria`.",
    }

    max_new_tokens: PositiveInt | None = None
    """Longest answer; when left out, the tokens of the longest answer in the file."""
    do_sample: bool = False
    """Draw tokens instead of taking the most probable one."""
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of sampling, 1 when left out; 0 is greedy."""
    top_k: NonNegativeInt | None = None
    """Keep the k most probable tokens; all when left out, or 0."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the most probable tokens that add up to this; all when left out."""
    num_beams: Literal[1] = 1
    """Accepted for old recipes; there is no beam search."""
    use_cache: bool = True
    """Accepted for old recipes; means nothing."""
    pad_token_id: int | None = None
    """Accepted for old recipes; padding is masked, so its id means nothing."""
    eos_token_id: int | None = None
    """Where an answer ends; the tokenizer's end of text when left out."""


class ICLTaskConfig(Config):
    """A task: questions in a jsonl file, examples before each of them, and how answers are scored."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "num_beams": "It belonged to `generation_kwargs`, and there is no beam search. Remove it.",
        "pass_at_k": "Code that a model wrote is not run. Remove the task.",
        "post_processing_funcs": "Use `early_stopping_criteria` and `do_normalization`.",
        "metric_kwargs": "None of the metrics takes arguments. Remove it.",
    }

    label: str = Field(min_length=1)
    """Name of the task; results are `LABEL/N-shot`."""
    dataset_uri: str = Field(min_length=1)
    """The jsonl file. `hf://NAME` takes a data set of the hub (or a folder) through the package datasets."""
    icl_task_type: TaskType
    """What a row of the file has: context and continuation; query, choices and gold; context_options, continuation and
    gold; context, answer and aliases."""
    num_fewshot: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Examples before each question, drawn from the other questions; each number is evaluated."""
    batch_size: PositiveInt | None = None
    """Sequences in a forward on one device; device_eval_batch_size when left out. Does not change the result."""
    max_seq_len: PositiveInt | None = None
    """Tokens of question and answer; what is too long loses its beginning. icl_seq_len when left out."""
    pad_tok_id: int | None = None
    """Accepted for old recipes; padding is masked, so its id means nothing."""
    prompt_string: str = ""
    """Text before the examples, once."""
    example_delimiter: str = "\n"
    """Between examples."""
    continuation_delimiter: str = " "
    """Between a context and its answer."""
    prelimiter: str = ""
    """Text before each context."""
    question_prelimiter: str | None = None
    """The older name of `prelimiter`."""
    cot_delimiter: str = ""
    """Between a chain of thought and the answer; only what stands behind it in a generated answer counts."""
    metric_names: tuple[str, ...] | None = None
    """Metrics; the accuracy of the task's type when left out. Both types that compare probabilities know an expected
    calibration error, too."""
    has_categories: bool = False
    """Rows have a `category`, and each category is a task of its own, `LABEL/N-shot/CATEGORY`."""
    fewshot_random_seed: int = 1234
    """Draws the examples."""
    generation_kwargs: ICLGenerationConfig = Field(default_factory=ICLGenerationConfig)
    """How answers are generated."""
    generations_per_sample: Literal[1] = 1
    """Accepted for old recipes: one answer a question is scored."""
    early_stopping_criteria: tuple[str, ...] = ()
    """A generated answer ends before the first of these texts."""
    do_normalization: bool = True
    """Compare answers without case, punctuation and articles."""
    hf_loading_vars: dict[str, Any] = Field(default_factory=dict)
    """Arguments of datasets.load_dataset, for `hf://`."""
    hf_parsing_map: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Key of a row -> columns of the data set, joined by blanks, for `hf://`."""

    @property
    def before_each(self) -> str:
        """The text before each context."""
        return self.question_prelimiter if self.question_prelimiter is not None else self.prelimiter

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are computed."""
        return self.metric_names if self.metric_names is not None else METRICS[self.icl_task_type][:1]

    @field_validator("icl_task_type", mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        if value == "code_evaluation":
            raise ValueError("Code that a model wrote is not run. Remove the task.")
        return _OLD_TYPES.get(value, value) if isinstance(value, str) else value

    @field_validator("num_fewshot", mode="before")
    @classmethod
    def _one_number_will_do(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @field_validator("num_fewshot")
    @classmethod
    def _numbers_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("A number stands there twice.")
        return value

    @field_validator("label")
    @classmethod
    def _label_is_a_name(cls, value: str) -> str:
        if "/" in value:
            raise ValueError("Results are `LABEL/N-shot`, so a label has no slash.")
        return value

    @field_validator("dataset_uri")
    @classmethod
    def _is_here(cls, value: str) -> str:
        if "://" in value and not value.startswith("hf://"):
            raise ValueError("Tasks are read from local files and `hf://`. Download it first, and give the file.")
        return value

    @field_validator("generation_kwargs", "hf_loading_vars", "hf_parsing_map", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("early_stopping_criteria", mode="before")
    @classmethod
    def _none_is_none(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("early_stopping_criteria")
    @classmethod
    def _texts_are_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("An empty text would end every answer before it begins.")
        return value

    @model_validator(mode="before")
    @classmethod
    def _renamed_metrics(cls, data: Any) -> Any:
        names = data.get("metric_names") if isinstance(data, Mapping) else None
        if not isinstance(names, (list, tuple)):
            return data
        ece = LM_ECE if data.get("icl_task_type") == "language_modeling" else MC_ECE
        return {**data, "metric_names": [(_OLD_METRICS[n] or ece) if n in _OLD_METRICS else n for n in names]}

    @model_validator(mode="after")
    def _metrics_fit(self) -> Self:
        known = METRICS[self.icl_task_type]
        for name in self.metric_names or ():
            if name not in known:
                raise mistake(f"A task of type {self.icl_task_type} has {' and '.join(known)}.", "metric_names")
        if self.metric_names == ():
            raise mistake("At least one metric, or leave the key out.", "metric_names")
        if self.question_prelimiter is not None and self.prelimiter not in ("", self.question_prelimiter):
            raise mistake("It is the older name of `prelimiter`. Keep one of the two.", "question_prelimiter")
        return self


class BenchmarkConfig(Config):
    """A task's place in a category."""

    name: str
    """The task's label."""
    num_fewshot: NonNegativeInt
    """Which of its numbers of examples counts."""
    random_baseline: float = Field(default=0.0, ge=0, lt=1)
    """Accuracy of guessing."""


class CategoryConfig(Config):
    """Tasks that are averaged."""

    name: str
    """Of the average."""
    benchmarks: NotEmpty[BenchmarkConfig]
    """The tasks."""


class GauntletConfig(Config):
    """Averages of accuracies, by category."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "logger_keys": "It follows from `icl_tasks`. Remove it.",
        "benchmark_sizes": "It follows from the tasks' files. Remove it.",
        "tasks": "The key is `categories`.",
    }

    weighting: Literal["EQUAL", "SAMPLE_SZ", "LOG_SAMPLE_SZ"] = "EQUAL"
    """Weight of a benchmark in its category: equal, its number of questions, or the binary logarithm of that."""
    subtract_random_baseline: bool = True
    """Subtract the accuracy of guessing."""
    rescale_accuracy: bool = True
    """Then divide by 1 - that accuracy: guessing is 0, all right is 1."""
    categories: NotEmpty[CategoryConfig]
    """The categories."""
    averages: dict[str, tuple[str, ...]] | None = None
    """Name -> categories that are averaged; `default_average` of all of them when left out."""

    @property
    def named_averages(self) -> dict[str, tuple[str, ...]]:
        """Name -> categories."""
        everything = {"default_average": tuple(category.name for category in self.categories)}
        return everything if self.averages is None else self.averages

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is averaged."""
        return (*(category.name for category in self.categories), *self.named_averages)

    @field_validator("weighting", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [category.name for category in self.categories]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise mistake("Two categories have this name.", f"categories.{index}.name")
        for average, parts in (self.averages or {}).items():
            if average in names:
                raise mistake("A category has this name.", f"averages.{average}")
            if unknown := [part for part in parts if part not in names]:
                raise mistake(f"No category {unknown[0]!r}. Known: {', '.join(names)}.", f"averages.{average}")
        if self.rescale_accuracy and not self.subtract_random_baseline:
            raise mistake("It needs `subtract_random_baseline: true`.", "rescale_accuracy")
        return self


class TasksFile(Config):
    """A YAML file of tasks."""

    icl_tasks: NotEmpty[ICLTaskConfig]
    """The tasks."""


class GauntletFile(Config):
    """A YAML file with a gauntlet."""

    eval_gauntlet: GauntletConfig
    """The gauntlet."""


def _tasks(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, str):
        return value
    folder = Path(value).parent
    return tuple(_found(task, folder) for task in load(value, TasksFile).icl_tasks)


def _found(task: ICLTaskConfig, folder: Path) -> ICLTaskConfig:
    """Files are looked for where the command runs, as llm-foundry does, and beside the YAML that names them."""
    beside = folder / task.dataset_uri
    if "://" in task.dataset_uri or Path(task.dataset_uri).exists() or not beside.exists():
        return task
    return task.model_copy(update={"dataset_uri": str(beside)})


def _gauntlet(value: Any) -> Any:
    return load(value, GauntletFile).eval_gauntlet if isinstance(value, str) else value


Tasks = Annotated[
    tuple[ICLTaskConfig, ...],
    BeforeValidator(_tasks, json_schema_input_type=str | tuple[ICLTaskConfig, ...] | None),
]
"""A list of tasks, or the path of a YAML file that has them under `icl_tasks`."""

Gauntlet = Annotated[
    GauntletConfig | None, BeforeValidator(_gauntlet, json_schema_input_type=str | GauntletConfig | None)
]
"""A gauntlet, or the path of a YAML file that has one under `eval_gauntlet`."""


class ICLConfig(Config):
    """All that an evaluation of tasks needs to know; the keys are those of a recipe."""

    icl_tasks: Tasks
    """The tasks, or the path of a YAML file."""
    eval_gauntlet: Gauntlet = None
    """Averages, or the path of a YAML file."""
    icl_seq_len: PositiveInt = 2048
    """Tokens of question and answer, for tasks that do not say."""
    icl_subset_num_batches: int = Field(default=-1, ge=-1)
    """Batches of each task on each rank; -1 is all."""
    device_eval_batch_size: PositiveInt = 8
    """Sequences in a forward, for tasks that do not say."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        refuse_repeated(self.icl_tasks)
        return self


def refuse_repeated(tasks: Sequence[ICLTaskConfig]) -> None:
    """Refuse two results of one name.

    Raises:
        PydanticCustomError: two tasks have a label and a number of examples in common.
    """
    known: set[tuple[str, int]] = set()
    for index, task in enumerate(tasks):
        for shots in task.num_fewshot:
            if (task.label, shots) in known:
                raise mistake(f"{task.label}/{shots}-shot stands there twice.", f"icl_tasks.{index}.label")
            known.add((task.label, shots))
