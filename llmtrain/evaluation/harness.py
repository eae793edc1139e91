"""Tasks of EleutherAI's lm-evaluation-harness on a model of ours, without exporting it first."""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.evaluation.harness_config import HarnessConfig, HarnessTask
from llmtrain.evaluation.ranks import Ranks
from llmtrain.evaluation.results import TaskResult, TaskResults
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
"""What of the harness's own results goes into the JSON file."""


def run_harness(
    model: MPT | HFCausalLM,
    tokenizer: "PreTrainedTokenizerFast",
    tasks: HarnessConfig,
    ranks: Ranks | None = None,
    *,
    sharded: bool = False,
    console: Console | None = None,
    samples: Path | None = None,
) -> TaskResults:
    """Run tasks; the harness builds the questions and computes the metrics, with its own fixed seeds.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        tasks: which, and how.
        ranks: who shares the work; all of them call this.
        sharded: whether they share the model as well.
        console: shows progress and what is worth knowing; standard output when left out.
        samples: with `log_samples`, the folder that gets `samples-TASK.jsonl`.

    Returns:
        The same on all ranks. Rows of groups where they have metrics of their own, of tasks otherwise; all of the
        harness's numbers are in `about["harness"]`.

    Raises:
        UserError: the extra is not installed, or a task, its data or a setting is not usable.
    """
    ranks = ranks or Ranks()
    console = console or Console()
    _require(tasks, tokenizer)
    with _quiet(console):
        import lm_eval
        from lm_eval import evaluator

        from llmtrain.evaluation.harness_model import HarnessModel, set_seeds
        from llmtrain.evaluation.harness_tasks import Tasks, name_of

        lm = HarnessModel(
            model,
            tokenizer,
            ranks=ranks,
            sharded=sharded,
            batch_tokens=tasks.batch_tokens,
            max_length=tasks.max_length,
            console=console,
        )
        known = Tasks(tasks)
        set_seeds()
        with contextlib.nullcontext() if ranks.is_first and console.is_terminal else _unsaid():  # downloads have bars
            loaded = [(task, name_of(spec), known.load(task, spec)) for task, spec in known.specs]
        for note in known.notes if ranks.is_first else ():
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        rows: list[TaskResult] = []
        runs: list[dict[str, Any]] = []
        for task, name, task_dict in loaded:
            lm.what = name
            set_seeds()
            with _unsaid():
                found = evaluator.evaluate(
                    lm=lm,
                    task_dict=task_dict,
                    limit=task.limit or tasks.limit,
                    bootstrap_iters=tasks.bootstrap_iters,
                    log_samples=tasks.log_samples,
                    system_instruction=tasks.system_instruction,
                    apply_chat_template=tasks.apply_chat_template,
                    fewshot_as_multiturn=tasks.apply_chat_template and tasks.fewshot_as_multiturn,
                    confirm_run_unsafe_code=tasks.confirm_run_unsafe_code,
                )
            # All ranks have computed the metrics; but the first one's count, as bootstrap and clocks may differ.
            run = {"task": name, **{key: found[key] for key in _KEPT if key in found}}
            run = ranks.gather_each(json.loads(json.dumps(run, default=_plain)))[0]
            of_task = _rows(task, name, run)
            if ranks.is_first:
                _compare(console, task, name, of_task, task.limit or tasks.limit)
            rows += of_task
            runs.append(run)
            if tasks.log_samples and samples is not None and ranks.is_first:
                _write_samples(samples, found["samples"])
    settings = tasks.model_dump(mode="json", exclude={"tasks"}, exclude_defaults=True)
    about = {"lm_eval": lm_eval.__version__, "max_length": lm.max_length, **settings, "runs": runs}
    return TaskResults(rows, about={"harness": about})


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else, functions of tasks for example, as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _require(tasks: HarnessConfig, tokenizer: "PreTrainedTokenizerFast") -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError(
            "Tasks of lm-evaluation-harness need the package lm-eval. Install it: pip install 'llmtrain[eval]'"
        )
    if tasks.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            f"apply_chat_template: the tokenizer {tokenizer.name_or_path} has no chat template; the model was not "
            "trained on conversations. Leave it out"
        )


def _rows(task: HarnessTask, name: str, run: Mapping[str, Any]) -> list[TaskResult]:
    """Of groups with metrics of their own, or else of all tasks."""
    of_groups: dict[str, Any] = run.get("groups") or {}
    found = []
    for entry, metrics in (of_groups or run["results"]).items():
        n = run["n-samples"].get(entry, {}).get("effective")
        if n is None:
            n = sum(run["n-samples"][leaf]["effective"] for leaf in _members(entry, run["group_subtasks"]))
        for key, value in metrics.items():
            metric, _, name_of_filter = key.partition(",")
            if not name_of_filter or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = metric if name_of_filter == "none" else key
            stderr = metrics.get(f"{metric}_stderr,{name_of_filter}")
            higher = run["higher_is_better"].get(entry, {}).get(metric)
            found.append(
                TaskResult(
                    task=entry,
                    num_fewshot=_number(run["n-shot"].get(entry)),
                    metric=label,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    n=n or None,
                    expected=task.expected.get(label) if entry in (name, task.task) else None,
                    higher_is_better=higher is not False,
                )
            )
    return found


def _members(group: str, subtasks: Mapping[str, list[str]]) -> Iterator[str]:
    for name in subtasks.get(group, []):
        if subtasks.get(name):
            yield from _members(name, subtasks)
        else:
            yield name


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _compare(console: Console, task: HarnessTask, name: str, rows: list[TaskResult], limit: int | None) -> None:
    """Say which expected values were met, and which metric that was expected the task does not have."""
    for metric, expected in task.expected.items():
        row = next((row for row in rows if row.metric == metric and row.expected is not None), None)
        if row is None:
            line = f"note: {name}: {metric} {expected:g} is expected, and the task gives no such metric"
        elif limit is not None:
            line = f"note: {row.label}: {metric} {row.value:.4f} of {limit} samples; {expected:g} is of all"
        else:
            near = abs(row.value - expected) <= task.tolerance
            how = "as expected" if near else "NOT as expected"
            line = f"{row.label}: {metric} {row.value:.4f}, {how} ({expected:g} within {task.tolerance:g})"
        console.print(line, highlight=False, soft_wrap=True)


def _write_samples(folder: Path, samples: Mapping[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for task, lines in samples.items():
        file = folder / f"samples-{task.replace('/', '_')}.jsonl"
        temporary = file.with_name(f".{file.name}.writing")
        try:
            with temporary.open("w", encoding="utf-8") as out:
                for line in lines:
                    out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet(console: Console) -> Iterator[None]:
    """Without the harness's running commentary; what is worth knowing is said on the console."""
    logger = logging.getLogger("lm_eval")
    before, workers = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    console.file = console.file  # else it would follow sys.stdout where that is put aside
    # Bootstrap in this process: a pool would copy a process with a model, threads and perhaps a GPU.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(before)
        if workers is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = workers


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """What is printed, bars and such, is shown only where something went wrong that nobody foresaw."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            yield
    except UserError:
        raise
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
