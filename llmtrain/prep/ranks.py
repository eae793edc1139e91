"""`llmtrain prep --rank R --world-size W`: a share of the work, where a scheduler starts many processes."""

from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.job import job_of, unfinished_plan
from llmtrain.prep.partition import finished_partitions
from llmtrain.prep.passes import is_reduced, reduce_pass, signed_partitions
from llmtrain.prep.run import (
    Options,
    check_options,
    finished,
    new_plan,
    open_engine,
    passes_of,
    refuse_changed,
    run_partitions,
    run_pass_of,
    say_finished,
)
from llmtrain.prep.work import OUTPUT


def run_rank(recipe: PrepRecipe, console: Console, options: Options) -> None:
    """Make the partitions of one rank, and leave out the merge; the first rank to come makes the plan.

    Raises:
        UserError: an option is wrong, another process has this rank, or see `prepare`.
    """
    rank, world_size = _checked(options)
    job = job_of(recipe)
    work = job.work()
    inputs = manifest.inputs_content(recipe, job.out)
    done = finished(job, inputs)
    if done is not None:
        say_finished(job, done, console)
        return
    with work.lock(OUTPUT, shared=True), work.lock(f"rank-{rank:05}"):
        with work.lock("plan", wait=True):
            plan = unfinished_plan(work)
            if plan is None:
                done = finished(job, inputs)
                if done is not None:  # merged, since we looked
                    say_finished(job, done, console)
                    return
                plan = new_plan(job, inputs, console)
        refuse_changed(plan, recipe, inputs)
        engine = open_engine(options, plan)
        mine = range(rank, len(plan.partitions), world_size)
        for name in passes_of(recipe):
            run_pass_of(job, plan, engine, console, name, mine)
            n_signed = len(signed_partitions(work, name))
            if n_signed < len(plan.partitions) and not is_reduced(work, name):
                _say(
                    console,
                    f"rank {rank} of {world_size}: {name} has seen its {len(mine):,} partitions, and "
                    f"{n_signed:,} of {len(plan.partitions):,} in all. When no rank is missing: start all ranks again, "
                    "for what comes after it",
                )
                return
            with work.lock(f"reduce-{name}", wait=True):
                reduce_pass(job, name)
        run_partitions(job, plan, engine, console, mine)
        n_done = len(finished_partitions(work))
    _say(
        console,
        f"rank {rank} of {world_size}: its {len(mine):,} partitions are done; {n_done:,} of {len(plan.partitions):,} "
        "in all. When none is missing: llmtrain prep merge RECIPE",
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _checked(options: Options) -> tuple[int, int]:
    rank, world_size = options.rank, options.world_size
    if rank is None or world_size is None:
        raise UserError("--rank and --world-size go together: --rank 3 --world-size 64")
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: give at least 1")
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: ranks are numbered from 0 to {world_size - 1} (--world-size {world_size})")
    if options.engine != "local":
        raise UserError(f"--engine {options.engine} shares out the work itself: leave out --rank and --world-size")
    if options.only_plan or options.overwrite:
        raise UserError(
            "--plan and --overwrite concern all ranks: run `llmtrain prep RECIPE --plan --overwrite` once, and then "
            "the ranks without them"
        )
    check_options(options)
    return rank, world_size
