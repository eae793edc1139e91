"""llm-foundry's tasks from the command line: `icl_tasks` and `eval_gauntlet` of an evaluation recipe."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.evaluation.evaluate import check_length
from llmtrain.evaluation.icl import gauntlet, metrics
from llmtrain.evaluation.icl.config import LM_ECE, MC_ECE, METRICS, ICLConfig
from llmtrain.evaluation.icl.task import Task, TaskScores, build_tasks
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.results import TaskResult, TaskResults
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_icl(
    model: MPT | HFCausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    cfg: ICLConfig,
    ranks: Ranks,
    *,
    sharded: bool,
    console: Console,
) -> TaskResults:
    """Put all tasks to a model; the same results on all ranks (a collective call).

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        cfg: tasks, gauntlet and what they have in common.
        ranks: who takes part.
        sharded: the model is spread over the ranks.
        console: rank 0 shows progress there.

    Raises:
        UserError: on all ranks: a file or a row of it is unusable, or questions do not fit into the model.
    """

    def say(line: str) -> None:
        if ranks.is_first:
            console.print(line, highlight=False, soft_wrap=True)

    tasks: list[Task] = []
    problem = None
    try:
        tasks = build_tasks(cfg, tokenizer, ranks, say=say)
        for length in {task.max_seq_len for task in tasks}:
            check_length(model, length)
    except UserError as error:
        problem = str(error)
    if problems := [text for text in ranks.gather_each(problem) if text is not None]:
        raise UserError(problems[0])  # all together: one that fails alone leaves the others waiting
    total = sum(task.sequences(ranks, sharded=sharded) for task in tasks)
    shown = progress(console, "tasks", total, "sequences") if ranks.is_first else nullcontext(lambda n: None)
    with shown as advance:
        scores = {task.label: task.evaluate(model, ranks, sharded=sharded, advance=advance) for task in tasks}
    return results(cfg, tasks, scores, say)


def results(cfg: ICLConfig, tasks: list[Task], scores: dict[str, TaskScores], say: gauntlet.Say) -> TaskResults:
    """Rows and averages of what was measured; a task with categories has a row for their mean, too."""
    guesses = gauntlet.random_baselines(cfg.eval_gauntlet)
    rows = []
    for one in cfg.icl_tasks:
        for num_fewshot in one.num_fewshot:
            parts = [task for task in tasks if (task.cfg, task.num_fewshot) == (one, num_fewshot)]
            guess = guesses.get(f"{one.label}/{num_fewshot}-shot")
            if one.has_categories:
                rows += [_row(name, parts, scores, one.label, guess) for name in one.metrics]
            for part in parts:
                where = f"{one.label}/{part.category}" if part.category else one.label
                rows += [_row(name, [part], scores, where, guess) for name in one.metrics]
    averages = {}
    if cfg.eval_gauntlet is not None:
        averages = gauntlet.averages(
            cfg.eval_gauntlet,
            {label: accuracy for label, found in scores.items() if (accuracy := accuracy_of(found)) is not None},
            {task.label: task.n_questions for task in tasks},
            say,
        )
    return TaskResults(rows, averages, {"icl_questions": sum(task.n_questions for task in tasks)})


def _row(metric: str, parts: list[Task], scores: dict[str, TaskScores], name: str, guess: float | None) -> TaskResult:
    """One metric of a task, or its plain mean over categories (as in the gauntlet)."""
    is_accuracy = metric not in (LM_ECE, MC_ECE)
    found = [scores[part.label] for part in parts]
    guesses = [part.random_baseline for part in parts]
    if guess is None and None not in guesses:
        guess = sum(g for g in guesses if g is not None) / len(guesses)
    return TaskResult(
        task=name,
        num_fewshot=parts[0].num_fewshot,
        metric=metric,
        value=sum(one.values[metric] for one in found) / len(found),
        stderr=metrics.standard_error(found[0].outcomes) if is_accuracy and len(found) == 1 else None,
        n=sum(part.n_questions for part in parts),
        random_baseline=guess if is_accuracy else None,
        higher_is_better=is_accuracy,
    )


def accuracy_of(scores: TaskScores) -> float | None:
    """The accuracy among a task's metrics: what a gauntlet averages."""
    known = {names[0] for names in METRICS.values()}
    return next((value for name, value in scores.values.items() if name in known), None)
