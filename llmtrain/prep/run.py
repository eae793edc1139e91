"""`llmtrain prep`: a data recipe carried out, from sources to shards."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from rich.console import Console

from llmtrain.config.base import Config
from llmtrain.config.load import load
from llmtrain.cores import available_cores
from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.conversation_config import ConversationRecipe
from llmtrain.prep.engines import Engine, Task
from llmtrain.prep.engines.local import LocalEngine
from llmtrain.prep.job import Job, job_of, unfinished_plan
from llmtrain.prep.merge import merge, missing_partitions
from llmtrain.prep.mixture import NAME as MIXTURE
from llmtrain.prep.mixture import mixture_yaml
from llmtrain.prep.partition import finished_partitions, is_begun, make_partition
from llmtrain.prep.passes import is_reduced, reduce_pass, run_pass, signed_partitions
from llmtrain.prep.plan import Plan
from llmtrain.prep.planning import bytes_to_read, changes, make_plan
from llmtrain.prep.report import print_functions, print_made, print_new_weights, print_nothing_to_do, print_plan
from llmtrain.prep.work import OUTPUT
from llmtrain.progress import progress

_BYTES_PER_PROCESS = 4 << 20  # with less to do, another process takes longer to start than it helps


@dataclass(frozen=True)
class Options:
    """How a recipe is carried out: nothing here changes what is written."""

    processes: int | None = None
    """Of this machine; None: one a core, as far as there is work for them."""
    engine: str = "local"
    """Who runs them: `local`, `spark` or `datatrove`."""
    master: str | None = None
    """Of Spark: `local[2]`, `spark://HOST:7077`."""
    rank: int | None = None
    """Do this rank's partitions only, those whose number is `rank` modulo `world_size`, and leave out the merge."""
    world_size: int | None = None
    """Number of ranks."""
    only_plan: bool = False
    """Plan, and stop."""
    overwrite: bool = False
    """As the recipe's `overwrite: true`."""


def prepare(recipe_file: Path, overrides: Sequence[str] = (), options: Options | None = None) -> None:
    """Carry out a data recipe; prints progress, totals, and the loader's YAML.

    Raises:
        UserError: the recipe, an option, a source or the tokenizer has a mistake, or `out` holds something else.
    """
    recipe, options, console = load_recipe(recipe_file, overrides), options or Options(), Console()
    if options.overwrite:
        recipe = recipe.model_copy(update={"overwrite": True})
    if isinstance(recipe, ConversationRecipe):
        from llmtrain.prep.conversations import run as run_conversations

        if options != Options(overwrite=options.overwrite):
            raise UserError(f"{recipe_file}: task: finetuning is carried out by one process; --overwrite is its option")
        run_conversations(recipe, console)
        return
    print_functions(console, recipe)
    if options.rank is not None or options.world_size is not None:
        from llmtrain.prep.ranks import run_rank

        run_rank(recipe, console, options)
    else:
        run(recipe, console, options)


def prepare_merge(recipe_file: Path, overrides: Sequence[str] = ()) -> None:
    """Merge what the ranks of a recipe have made; prints totals, and the loader's YAML.

    Raises:
        UserError: partitions are missing; see also `prepare`.
    """
    recipe, console = load_recipe(recipe_file, overrides), Console()
    if isinstance(recipe, ConversationRecipe):
        raise UserError(f"{recipe_file}: task: finetuning is carried out by one process; there is nothing to merge")
    print_functions(console, recipe)
    run_merge(recipe, console)


def load_recipe(recipe_file: Path, overrides: Sequence[str] = ()) -> PrepRecipe | ConversationRecipe:
    """Read a data recipe; its `task` decides what the other keys may be.

    Raises:
        ConfigError: with every mistake that was found.
    """
    task = load(recipe_file, _Task, overrides).task
    if task == "finetuning":
        return load(recipe_file, ConversationRecipe, overrides)
    return load(recipe_file, PrepRecipe, overrides)


class _Task(Config):
    """The one key that decides what the others may be."""

    model_config = ConfigDict(extra="ignore")

    task: Literal["pretraining", "finetuning"] = "pretraining"
    """What the shards are for."""


def run(recipe: PrepRecipe, console: Console, options: Options | None = None) -> dict[str, Any]:
    """Make `recipe.out`, and return its manifest (`prep.json`); `{}` when it was only planned.

    Nothing appears at `out` before it is complete, and an interrupted run goes on where it was when it is started
    again. The same recipe on the same inputs gives the same bytes; done already, it says so and does nothing.

    Raises:
        UserError: see `prepare`.
    """
    options, start = options or Options(), time.monotonic()
    check_options(options)
    job = job_of(recipe)
    work = job.work()
    inputs = manifest.inputs_content(recipe, job.out)
    done = finished(job, inputs)
    if done is not None and work.is_clean():
        return say_finished(job, done, console)
    with work.lock(OUTPUT):
        work.repair()
        done = finished(job, inputs)
        if done is not None:
            return say_finished(job, done, console)
        with _left_in_order(job, console):
            plan = open_plan(job, inputs, console)
            if options.only_plan:
                print_plan(console, recipe, plan)
                return {}
            engine = open_engine(options, plan)
            everything = range(len(plan.partitions))
            for name in passes_of(recipe):
                run_pass_of(job, plan, engine, console, name, everything)
                reduce_pass(job, name)
            run_partitions(job, plan, engine, console, everything)
        merged = merge(job)
    print_made(console, recipe, merged, time.monotonic() - start)
    return merged.content


def run_merge(recipe: PrepRecipe, console: Console) -> dict[str, Any]:
    """Merge what ranks have made, and return the manifest.

    Raises:
        UserError: partitions are missing, the recipe or its inputs have changed, or there is nothing.
    """
    start = time.monotonic()
    job = job_of(recipe)
    work = job.work()
    inputs = manifest.inputs_content(recipe, job.out)
    done = finished(job, inputs)
    if done is not None and work.is_clean():
        return say_finished(job, done, console)
    with work.lock(OUTPUT):
        work.repair()
        plan = unfinished_plan(work)
        if plan is None:
            done = finished(job, inputs)
            if done is None:
                raise UserError(f"out: there is no unfinished work on {recipe.out}: nothing to merge")
            return say_finished(job, done, console)
        refuse_changed(plan, recipe, inputs)
        missing = missing_partitions(job)
        if missing:
            some = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
            raise UserError(
                f"out: {recipe.out}: {len(missing):,} of {len(plan.partitions):,} partitions are missing: {some}. Run "
                "the ranks that they belong to (number modulo world size) again, or `llmtrain prep` without --rank"
            )
        merged = merge(job)
    print_made(console, recipe, merged, time.monotonic() - start)
    return merged.content


def open_plan(job: Job, inputs: dict[str, Any], console: Console) -> Plan:
    """The plan of unfinished work, or a new one; to be called under the lock of the output.

    Raises:
        UserError: the unfinished work is of another recipe or other inputs, and may not be discarded.
    """
    work = job.work()
    plan = unfinished_plan(work)
    if plan is not None:
        if changes(plan, job.recipe, inputs) and (job.recipe.overwrite or not is_begun(work)):
            work.discard()
        else:
            refuse_changed(plan, job.recipe, inputs)
            n_done = len(finished_partitions(work))
            console.print(f"going on: {n_done:,} of {len(plan.partitions):,} partitions are done", highlight=False)
            return plan
    return new_plan(job, inputs, console)


def new_plan(job: Job, inputs: dict[str, Any], console: Console) -> Plan:
    """A plan where there is none; to be called by one process at a time.

    What lies there without one is of work that was being discarded, or of a finished output that may be replaced:
    another recipe's partitions must not be taken for this one's.
    """
    work = job.work()
    replaces = work.published(MANIFEST) is not None
    work.discard()
    return make_plan(job, inputs, console, replaces=replaces)


def refuse_changed(plan: Plan, recipe: PrepRecipe, inputs: dict[str, Any]) -> None:
    """Raise UserError unless the plan is of this recipe and these inputs."""
    changed = changes(plan, recipe, inputs)
    if changed:
        raise UserError(
            f"out: there is unfinished work on {recipe.out} with other settings; changed since: {', '.join(changed)}. "
            "Go on with what it was, choose another folder, or discard it with --overwrite"
        )


def check_options(options: Options) -> None:
    """Before anything is read: planning may take long.

    Raises:
        UserError: an option is wrong, or does not go with another.
    """
    if options.engine not in {"local", "spark", "datatrove"}:
        raise UserError(f"--engine {options.engine}: expected local, spark or datatrove")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes {options.processes}: give at least 1")
    if options.processes is not None and options.engine == "spark":
        raise UserError("--processes: how many work at a time is Spark's affair: --master 'local[4]', or its settings")
    if options.master is not None and options.engine != "spark":
        raise UserError("--master is Spark's: give --engine spark, too")


def open_engine(options: Options, plan: Plan) -> Engine:
    """The engine that the options name.

    Raises:
        UserError: it is not installed.
    """
    if options.engine == "spark":
        from llmtrain.prep.engines.spark import SparkEngine

        return SparkEngine(options.master)
    unknown = any(partition.size == 0 for partition in plan.partitions)  # of the hub: nobody says how large it is
    enough = available_cores() if unknown else max(1, plan.size // _BYTES_PER_PROCESS)
    processes = options.processes or min(available_cores(), enough)
    if options.engine == "datatrove":
        from llmtrain.prep.engines.datatrove import DatatroveEngine

        return DatatroveEngine(processes)
    return LocalEngine(processes)


def passes_of(recipe: PrepRecipe) -> list[str]:
    """The passes that a recipe's stages need before anything is tokenised."""
    if not recipe.stages:
        return []
    from llmtrain.prep.stages import passes

    return passes(recipe.stages)


def run_pass_of(job: Job, plan: Plan, engine: Engine, console: Console, name: str, numbers: Sequence[int]) -> None:
    """Sign those of some partitions for a pass that are not signed yet."""
    work = job.work()
    done = set(numbers) if is_reduced(work, name) else signed_partitions(work, name)
    _map(
        partial(run_pass, job, name), [number for number in numbers if number not in done], plan, engine, console, name
    )


def run_partitions(job: Job, plan: Plan, engine: Engine, console: Console, numbers: Sequence[int]) -> None:
    """Make those of some partitions that are not there yet."""
    done = finished_partitions(job.work())
    todo = [number for number in numbers if number not in done]
    _map(partial(make_partition, job), todo, plan, engine, console, "tokenizing")


def _map(task: Task, numbers: Sequence[int], plan: Plan, engine: Engine, console: Console, what: str) -> None:
    if numbers:
        with progress(console, what, bytes_to_read(plan, numbers), "bytes") as advance:
            engine.map(task, numbers, advance)


def finished(job: Job, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """See `manifest.finished`; what unfinished work was allowed to replace, it may replace still."""
    work = job.work()
    plan = unfinished_plan(work)
    replaces = plan is not None and plan.replaces and not changes(plan, job.recipe, inputs)
    return manifest.finished(job.recipe, inputs, work, replaces=replaces)


def say_finished(job: Job, done: dict[str, Any], console: Console) -> dict[str, Any]:
    """Say that there is nothing to do; but the weights of the sources are written down where they are others now."""
    mixture = mixture_yaml(job.recipe)
    renewed = {**done, "recipe": manifest.recipe_content(job.recipe)}
    if mixture is None or _weights(renewed) == _weights(done):
        print_nothing_to_do(console, job.recipe.out, done)
        return done
    job.work().amend({MIXTURE: mixture.encode(), MANIFEST: manifest.to_json(renewed)})
    print_new_weights(console, job.recipe)
    return renewed


def _weights(content: dict[str, Any]) -> list[Any]:
    return [[source.get(key) for key in ("name", *manifest.WEIGHTS)] for source in content["recipe"]["sources"]]


@contextmanager
def _left_in_order(job: Job, console: Console) -> Iterator[None]:
    """After an error before the first unit of work was done nothing is left behind; later, it is said what is."""
    try:
        yield
    except BaseException as error:
        work = job.work()
        if not is_begun(work):
            work.discard()
        elif not isinstance(error, UserError):
            n_done = len(finished_partitions(work))
            console.print(f"stopped with {n_done:,} partitions done: the same command goes on there", highlight=False)
        raise
