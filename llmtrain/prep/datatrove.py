"""Steps for a user's own datatrove pipeline, under any of its executors (local, SLURM, Ray).

A recipe through datatrove's scheduler, and documents out of datatrove's readers, filters and de-duplication:

    SlurmPipelineExecutor([RecipePartitions("data_prep/web.yaml")], tasks=256, ...)
    SlurmPipelineExecutor([WarcReader(...), Trafilatura(), MDSWriter("data_prep/web.yaml")], tasks=256, ...)

and when one of the two is done, in an executor of one task that depends on it: `MDSMerge("data_prep/web.yaml")`.

What a rank writes is hidden until the merge, and depends on the recipe and the rank's documents alone: a task that was
interrupted is run again, one that is finished does nothing.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.documents import Document, Part
from llmtrain.prep.fragments import LONG, fragments
from llmtrain.prep.job import Job, job_of, unfinished_plan
from llmtrain.prep.merge import merge, missing_partitions
from llmtrain.prep.partition import finished_partitions, is_made, write_partition
from llmtrain.prep.plan import Partition, Plan
from llmtrain.prep.planning import write_plan
from llmtrain.prep.ranks import run_rank
from llmtrain.prep.readers import BadInput
from llmtrain.prep.readers.row import good_row
from llmtrain.prep.report import print_made
from llmtrain.prep.run import Options, load_recipe, passes_of
from llmtrain.prep.work import OUTPUT
from llmtrain.tokenizer import fingerprint

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as problem:
    raise UserError(f"llmtrain.prep.datatrove: {problem}: pip install 'llmtrain[datatrove]'") from problem

_SAMPLE_CHARACTERS = 500_000


class RecipePass(PipelineStep):  # type: ignore[misc]
    """Does a rank's share of the next pass that a recipe's stages need (`exact_dedup`, `minhash_dedup`).

    An executor for each such stage, with the same number of tasks, before that of `RecipePartitions`.

    Args:
        recipe: file, or the recipe itself.
    """

    type = "💾 - WRITER"
    name = "llmtrain pass"

    def __init__(self, recipe: PrepRecipe | str | Path) -> None:
        super().__init__()
        self.recipe = _recipe(recipe)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """See `PipelineStep`; takes no documents, and gives none.

        Raises:
            UserError: see `run_rank`.
        """
        run_rank(self.recipe, Console(stderr=True), Options(processes=1, rank=rank, world_size=world_size))


class RecipePartitions(RecipePass):
    """Makes a rank's share of a recipe's partitions, as `llmtrain prep RECIPE --rank R --world-size TASKS` does.

    Args:
        recipe: file, or the recipe itself.
    """

    name = "llmtrain recipe"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """See `PipelineStep`; takes no documents, and gives none.

        Raises:
            UserError: see `run_rank`; or a pass has to be over before.
        """
        super().run(data, rank, world_size)
        job = job_of(self.recipe)
        plan = unfinished_plan(job.work())
        if plan is not None and not finished_partitions(job.work()) >= set(
            range(rank, len(plan.partitions), world_size)
        ):
            names = ", ".join(passes_of(self.recipe))
            raise UserError(  # so that the executor does not take the task for completed
                f"rank {rank} of {world_size}: not all ranks have done {names} yet: for each "
                "of these an executor of RecipePass comes before this one (depends=)"
            )


class MDSWriter(PipelineStep):  # type: ignore[misc]
    """Writes the documents that reach a rank as the partition of that number, as a recipe says.

    The recipe says how: tokenizer, `max_seq_len`, `val_fraction`, `cut`, compression, filters. Its one source gives the
    documents their name; what the pipeline reads stands there as `files`, for the record. A document's `id` decides
    whether it is for validation, so ids must not change from run to run (datatrove's readers number them).

    Args:
        recipe: file, or the recipe itself, with one source and a tokenizer that exists.

    Raises:
        UserError: the recipe asks for what needs all documents at once.
    """

    type = "💾 - WRITER"
    name = "llmtrain MDS"

    def __init__(self, recipe: PrepRecipe | str | Path) -> None:
        super().__init__()
        self.recipe = _recipe(recipe)
        if len(self.recipe.sources) != 1:
            raise UserError(f"sources: a pipeline's documents are one source, found {len(self.recipe.sources)}")
        if self.recipe.tokenizer.train is not None:
            raise UserError(
                "tokenizer.train: a pipeline's documents pass once; train the tokenizer before, and name it"
            )
        if passes_of(self.recipe):
            names = ", ".join(passes_of(self.recipe))
            raise UserError(f"stages: {names} needs passes over all documents; take datatrove's own steps for it")

    def run(self, data: Iterable[Any] = (), rank: int = 0, world_size: int = 1) -> None:
        """See `PipelineStep`; gives no documents.

        Raises:
            UserError: `out` holds something else, unfinished work is of another recipe or number of tasks, another
                process has this rank, or the disk is full.
        """
        job = job_of(self.recipe)
        work = job.work()
        documents = iter(data or ())
        if _is_finished(job, world_size):
            return
        with work.lock(OUTPUT, shared=True), work.lock(f"rank-{rank:05}"):
            with work.lock("plan", wait=True):
                plan = unfinished_plan(work)
                if plan is None:
                    if _is_finished(job, world_size):  # merged, since we looked
                        return
                    first, sample = _taken(documents)
                    documents = chain(first, documents)
                    plan = self._plan(job, sample, world_size)
            _refuse_other(plan, job, world_size)
            if not is_made(job, rank):
                bad = BadInput(self.recipe.on_error)
                write_partition(job, rank, self._of_ours(documents, bad), bad)

    def _plan(self, job: Job, sample: list[str], world_size: int) -> Plan:
        partitions = (Partition(0, ()),) * world_size
        replaces = job.work().published(MANIFEST) is not None
        job.work().discard()  # see `new_plan`
        inputs = _inputs(job, world_size)
        return write_plan(job, inputs, Console(stderr=True), sample=sample, partitions=partitions, replaces=replaces)

    def _of_ours(self, documents: Iterator[Any], bad: BadInput) -> Iterator[Document]:
        for document in documents:
            self.stat_update("documents")
            yield from _parts(document.text, str(document.id), bad)


class MDSMerge(PipelineStep):  # type: ignore[misc]
    """Makes what all ranks of `RecipePartitions` or `MDSWriter` have written visible, in an executor of one task.

    Args:
        recipe: the same as theirs.
    """

    type = "💾 - WRITER"
    name = "llmtrain merge"

    def __init__(self, recipe: PrepRecipe | str | Path) -> None:
        super().__init__()
        self.recipe = _recipe(recipe)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """See `PipelineStep`.

        Raises:
            UserError: partitions are missing, or a split would be empty.
        """
        if rank != 0:
            return
        start = time.monotonic()
        job = job_of(self.recipe)
        work = job.work()
        with work.lock(OUTPUT):
            work.repair()
            if unfinished_plan(work) is None:
                if work.published(MANIFEST) is None:
                    raise UserError(
                        f"out: nothing has been written for {self.recipe.out}, so there is nothing to merge"
                    )
                return
            missing = missing_partitions(job)
            if missing:
                some = ", ".join(map(str, missing[:20])) + ", ..." * (len(missing) > 20)
                raise UserError(f"out: {self.recipe.out}: partitions are missing: {some}. Run their tasks again")
            made = merge(job)
        print_made(Console(stderr=True), self.recipe, made, time.monotonic() - start)


def _recipe(recipe: PrepRecipe | str | Path) -> PrepRecipe:
    loaded = recipe if isinstance(recipe, PrepRecipe) else load_recipe(Path(recipe))
    if not isinstance(loaded, PrepRecipe):
        raise UserError(f"{recipe}: task: finetuning is carried out by one process, not by a pipeline")
    return loaded


def _inputs(job: Job, world_size: int) -> dict[str, Any]:
    """As `manifest.inputs_content`, for documents whose origin is the pipeline's affair."""
    name = job.recipe.tokenizer.name
    assert name is not None
    local = Path(name).expanduser().is_dir()
    content: dict[str, Any] = {
        "sources": {source.name: {"datatrove_tasks": world_size} for source in job.recipe.sources},
        "local_tokenizer": fingerprint(name) if local else None,
    }
    if job.recipe.stages:
        from llmtrain.prep.stages import describe_stages

        content["stages"] = describe_stages(job.recipe.stages)
    return content


def _is_finished(job: Job, world_size: int) -> bool:
    plan = unfinished_plan(job.work())
    replaces = plan is not None and plan.replaces
    return manifest.finished(job.recipe, _inputs(job, world_size), job.work(), replaces=replaces) is not None


def _refuse_other(plan: Plan, job: Job, world_size: int) -> None:
    before, now = manifest.deciding(plan.recipe), manifest.deciding(manifest.recipe_content(job.recipe))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if len(plan.partitions) != world_size:
        changed.append(f"the number of tasks (was {len(plan.partitions)}, is {world_size})")
    if changed:
        raise UserError(
            f"out: there is unfinished work on {job.recipe.out} with other settings; changed since: "
            f"{', '.join(changed)}. Go on with what it was, or choose another folder"
        )


def _taken(documents: Iterator[Any]) -> tuple[list[Any], list[str]]:
    """The first documents, and a sample of their texts."""
    first, sample, left = [], [], _SAMPLE_CHARACTERS
    for document in documents:
        first.append(document)
        sample.append(document.text[:left].encode(errors="replace").decode())
        left -= len(document.text)
        if left <= 0:
            break
    return first, sample


def _parts(text: str, key: str, bad: BadInput) -> Iterator[Document]:
    """A document of datatrove's as ours, a long one in parts; none, which `bad` knows of, if it is no Unicode."""
    row = good_row(0, text, key, bad)
    if row is None:
        return
    parts = [text] if len(text) < 2 * LONG else list(fragments([text]))
    for number, part in enumerate(parts):
        label: Part = "first" if number == 0 else "middle"
        if number == len(parts) - 1:
            label = "whole" if number == 0 else "last"
        yield Document(part, row.n_bytes if label == "whole" else len(part.encode()), key, key, label)
