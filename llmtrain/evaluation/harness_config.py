"""Settings of lm-evaluation-harness: which tasks, with how many examples, and what is expected of them. Light."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from llmtrain.config.base import Config


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | Config) else value


def _as_task(value: Any) -> Any:
    return {"task": value} if isinstance(value, str) else value


class HarnessTask(Config):
    """One task, group or tag, and what differs for it."""

    task: str = Field(min_length=1)
    """Name of a task, a group or a tag of the harness; or the path of a task's YAML file or of a folder with such files
    (`!function` in them runs Python code that lies beside them)."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question, instead of `harness.num_fewshot`."""
    limit: PositiveInt | None = None
    """Samples of each task, instead of `harness.limit`."""
    expected: dict[str, float] = Field(default_factory=dict)
    """Metric -> value that was published for this model, on the harness's scale (accuracies are fractions). A filter's
    name follows behind a comma: `exact_match,strict-match`."""
    tolerance: PositiveFloat = 0.01
    """How far from `expected` is still the same."""


class HarnessConfig(Config):
    """Tasks of EleutherAI's lm-evaluation-harness (`harness:` in a recipe, `--tasks` on the command line)."""

    tasks: Annotated[
        tuple[Annotated[HarnessTask, BeforeValidator(_as_task)], ...],
        BeforeValidator(_as_list),
        Field(min_length=1),
    ]
    """Names of tasks, groups or tags, paths of YAML files that define some, or blocks with `task` and what differs."""
    include_path: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Folders with further tasks, which can then be named."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; the task's own number when left out. (A task that says 0 itself keeps it.)"""
    limit: PositiveInt | None = None
    """Samples of each task, from its beginning; all when left out."""
    batch_tokens: PositiveInt = 16_384
    """Tokens of one forward. Does not change the results but for rounding."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens that the model is given; longer contexts lose their beginning. The model's `max_seq_len` when left
    out."""
    apply_chat_template: bool = False
    """Whether questions are put as a user's turn of the tokenizer's chat template."""
    fewshot_as_multiturn: bool = True
    """With a chat template: whether each example is a turn of its own."""
    system_instruction: str | None = None
    """Stands before everything; with a chat template it is the system's turn."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Changes to the `generation_kwargs` of tasks that generate: `max_gen_toks`, `temperature`, `do_sample`, ..."""
    bootstrap_iters: int = Field(default=1000, ge=0)
    """Draws for the standard error of what is not a mean (perplexities, F1, BLEU); 0 leaves all standard errors out."""
    log_samples: bool = False
    """Whether each question, answer and score is written beside the results, in one jsonl file a task."""
    confirm_run_unsafe_code: bool = False
    """Whether tasks may run the code that the model writes (HumanEval, MBPP)."""
