"""llm-foundry's tasks while a model is trained: each is an evaluator of Composer's, so interval, loggers and
early stopping are those of all evaluations.

A task's evaluator has a single batch, which names the task. `LanguageModel.eval_forward` then puts all questions to
the model, each rank its share, and comes back with the same results on all ranks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from composer import Callback, Evaluator, Logger, State
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from llmtrain.errors import UserError
from llmtrain.evaluation.evaluate import check_length
from llmtrain.evaluation.icl import gauntlet
from llmtrain.evaluation.icl.config import GauntletConfig
from llmtrain.evaluation.icl.run import accuracy_of
from llmtrain.evaluation.icl.task import Task, TaskScores, build_tasks
from llmtrain.evaluation.ranks import Ranks
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.agreement import from_all_ranks, gets_on
from llmtrain.training.environment import say
from llmtrain.training.rows_by_step import add_rows, forget_later_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtrain.training.language_model import LanguageModel

TASK = "icl_task"
"""Key of the one batch of a task's evaluator; its value is the task's number."""

OUTPUTS = "eval_outputs.jsonl"
"""In the run's folder: one object a question, with `step`, `task`, `context`, what was scored, and `right`."""


class TaskMetric(Metric):
    """One metric of a task. All ranks have its value already."""

    full_state_update = False
    value: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_state("value", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    def update(self, scores: TaskScores) -> None:
        """Takes the value of a finished task."""
        self.value = self.value.new_tensor(scores.values[self.name])

    def compute(self) -> Tensor:
        """The value."""
        return self.value


class TaskEvaluation:
    """The tasks of a run. `LanguageModel` asks it when a batch names one of them.

    Attributes:
        tasks: in the order of the recipe; of a task with categories, one for each.
        latest: the newest scores of each, by label.
    """

    def __init__(self, tasks: Sequence[Task], device: torch.device, *, sharded: bool) -> None:
        self.tasks = list(tasks)
        self.latest: dict[str, TaskScores] = {}
        self._ranks = Ranks(dist.get_global_rank(), dist.get_world_size(), device)
        self._sharded = sharded and self._ranks.world > 1

    @property
    def labels(self) -> frozenset[str]:
        """The evaluators that are tasks."""
        return frozenset(task.label for task in self.tasks)

    def metrics(self) -> dict[str, Metric]:
        """All metrics that some task has."""
        names = dict.fromkeys(name for task in self.tasks for name in task.cfg.metrics)
        return {name: TaskMetric(name) for name in names}

    def evaluators(self) -> list[Evaluator]:
        """One for each task."""
        return [
            Evaluator(
                label=task.label,
                dataloader=DataSpec(
                    [{TASK: number}],
                    get_num_samples_in_batch=lambda batch, n=task.n_questions: n,
                    get_num_tokens_in_batch=lambda batch: 0,
                    split_batch=lambda batch, size: [batch],
                ),
                metric_names=list(task.cfg.metrics),
                subset_num_batches=-1,
                device_eval_microbatch_size=1,
            )
            for number, task in enumerate(self.tasks)
        ]

    def evaluate(self, model: "LanguageModel", number: int) -> TaskScores:
        """Puts a task to the model (a collective call)."""
        task = self.tasks[number]
        # Ranks that share sequences would have to be given the same ones; questions are short enough for one rank.
        shared = getattr(model.model, "ranks", None)
        if shared is not None:
            model.model.ranks = None
        try:
            scores = task.evaluate(model.model, self._ranks, sharded=self._sharded, advance=lambda sequences: gets_on())
        finally:
            if shared is not None:
                model.model.ranks = shared
        self.latest[task.label] = scores
        return scores


def task_evaluation(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", model: "LanguageModel", device: torch.device, batch_size: int
) -> TaskEvaluation | None:
    """The recipe's tasks, read and tokenized before the first step; None when it has none.

    Raises:
        UserError: on all ranks: a file is missing or wrong, questions do not fit into the model, or `early_stopper` or
            `best_checkpoint` watches a category that the file does not have.
    """
    cfg = recipe.icl(batch_size)
    if cfg is None:
        return None
    ranks, built = Ranks(dist.get_global_rank(), dist.get_world_size(), device), list[Task]()

    def build() -> None:
        built.extend(build_tasks(cfg, tokenizer, ranks, say=say))
        for length in {task.max_seq_len for task in built}:
            check_length(model.model, length)

    from_all_ranks(build)
    sharded = recipe.fsdp_config is not None and recipe.fsdp_config.sharding_strategy != "NO_SHARD"
    tasks = TaskEvaluation(built, device, sharded=sharded)
    known = {*recipe.evaluators(), *tasks.labels, gauntlet_label(recipe)}
    for key, label in recipe.watched_evaluators().items():
        if label not in known:
            raise UserError(f"{key}: {label}: there is no such evaluator. Known: {', '.join(sorted(known - {''}))}.")
    n_questions = sum(task.n_questions for task in built)
    say(f"tasks       {len(built)} of llm-foundry's kind, {n_questions:,} questions at each evaluation")
    return tasks


def gauntlet_label(recipe: Recipe) -> str:
    """What `best_checkpoint` calls the gauntlet; empty where there is none."""
    return "eval_gauntlet" if recipe.eval_gauntlet is not None else ""


class EvalGauntlet(Callback):  # type: ignore[misc]
    """Logs `icl/metrics/eval_gauntlet/NAME` for each category and average when all tasks have been evaluated."""

    def __init__(self, cfg: GauntletConfig, tasks: TaskEvaluation) -> None:
        self.cfg = cfg
        self.tasks = tasks
        self.latest: dict[str, float] = {}
        self._noted: set[str] = set()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._average(state, logger)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self._average(state, logger)

    def _average(self, state: State, logger: Logger) -> None:
        scores = self.tasks.latest.items()
        self.latest = gauntlet.averages(
            self.cfg,
            {label: value for label, found in scores if (value := accuracy_of(found)) is not None},
            {task.label: task.n_questions for task in self.tasks.tasks},
            self._note,
        )
        logger.log_metrics({f"{gauntlet.PREFIX}/{name}": value for name, value in self.latest.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.latest.items())
        say(f"{'gauntlet':<10}  step {int(state.timestamp.batch)}  {shown}")

    def _note(self, line: str) -> None:
        """Says once what is the same at each evaluation."""
        if line not in self._noted:
            self._noted.add(line)
            say(line)


class EvalOutputLogging(Callback):  # type: ignore[misc]
    """Writes the first questions of each task, and what the model made of them, at each evaluation.

    They go to RUN/eval_outputs.jsonl and, as a table, to the loggers. The settings are those of
    `llmtrain.training.callbacks.EvalOutputLoggingConfig`.
    """

    def __init__(self, n_rows: int = 3, log_tokens: bool = False, log_output_text: bool | None = None) -> None:
        self.n_rows = n_rows
        self._tasks: TaskEvaluation | None = None
        self._file: Path | None = None

    def attach(self, tasks: TaskEvaluation | None, folder: Path) -> None:
        """Gives it the run's tasks and folder."""
        self._tasks, self._file = tasks, folder / OUTPUTS

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._tasks is None:
            raise UserError(
                "callbacks.eval_output_logging: there are no tasks whose output it could show. Add icl_tasks."
            )

    def after_load(self, state: State, logger: Logger) -> None:
        """Drops what steps have left that are going to be taken again."""
        step = int(state.timestamp.batch)
        if dist.get_global_rank() == 0 and self._file is not None:
            forget_later_rows(self._file, step)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._log(state, logger)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        if self._tasks is None or self._file is None or dist.get_global_rank() != 0:
            return
        step, rows = int(state.timestamp.batch), list[dict[str, Any]]()
        for task in self._tasks.tasks:
            if task.label not in self._tasks.latest:
                continue
            for number, outcome in enumerate(self._tasks.latest[task.label].outcomes[: self.n_rows]):
                context, scored = task.shown(number)
                rows.append(
                    {
                        "step": step,
                        "task": task.label,
                        "context": context,
                        "scored": scored,
                        "answer": outcome.answer,
                        "right": outcome.right,
                    }
                )
        add_rows(self._file, step, rows)
        if rows:
            columns = list(rows[0])
            logger.log_table(columns, [[str(row[c]) for c in columns] for row in rows], name="eval_outputs", step=step)
