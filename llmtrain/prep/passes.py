"""Passes over all documents that stages need before anything is tokenised: partitions are signed, signatures compared.

Signing is a unit of work like making a partition; what each partition must drop is found in one place.
"""

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.prep.input_documents import documents_of
from llmtrain.prep.job import Job
from llmtrain.prep.readers import BadInput
from llmtrain.prep.work import Work

SIGNED = "signed"
"""Folder of signatures, a file for each pass and partition."""


def run_pass(job: Job, name: str, number: int, advance: Callable[[int], None] | None = None) -> None:
    """Sign the documents of a partition for a pass, unless that is done.

    Args:
        job: what it belongs to; planned, and the passes before this one reduced.
        name: of the pass.
        number: of the partition.
        advance: is called with bytes of text as they are read.

    Raises:
        UserError: bad input, a stage fails, or a full disk.
    """
    from llmtrain.prep.stages import passes, sign

    work = job.work()
    path = f"{SIGNED}/{_file_name(name, number)}.npz"
    if work.read(path) is not None:
        return
    stages = job.recipe.stages
    names = passes(stages)
    drops = read_drops(work, names[: names.index(name)], number)
    documents = documents_of(job, number, BadInput(job.recipe.on_error), advance)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **sign(stages, name, documents, drops))  # hashes do not compress
    work.write(path, buffer.getvalue())


def reduce_pass(job: Job, name: str) -> None:
    """Find what each partition must drop, once all are signed, unless that is done."""
    from llmtrain.prep.stages import reduce

    work, plan = job.work(), job.plan()
    if is_reduced(work, name):
        return
    parts = [partial(_signatures, work, name, number) for number in range(len(plan.partitions))]
    sources = [partition.source for partition in plan.partitions]
    for number, ordinals in enumerate(reduce(job.recipe.stages, name, parts, sources)):
        buffer = io.BytesIO()
        np.save(buffer, ordinals, allow_pickle=False)
        work.write(f"dropped/{_file_name(name, number)}.npy", buffer.getvalue())
    work.write(f"reduced/{name}.json", b"{}")


def is_reduced(work: Work, name: str) -> bool:
    """Whether a pass is over."""
    return work.read(f"reduced/{name}.json") is not None


def signed_partitions(work: Work, name: str) -> set[int]:
    """The partitions that are signed for a pass."""
    names = [file.removesuffix(".npz").partition(".") for file in work.names(SIGNED)]
    return {int(number) for number, _, of in names if of == name}


def read_drops(work: Work, names: Sequence[str], number: int) -> dict[str, NDArray[np.int64]]:
    """Pass -> ordinals of the documents that a partition drops, (n,).

    Raises:
        FileNotFoundError: a pass is not over.
    """
    drops = {}
    for name in names:
        data = work.read(f"dropped/{_file_name(name, number)}.npy")
        if data is None:
            raise FileNotFoundError(f"pass {name} is not over for partition {number}")
        drops[name] = np.load(io.BytesIO(data))
    return drops


def _signatures(work: Work, name: str, number: int) -> Any:
    data = work.read(f"{SIGNED}/{_file_name(name, number)}.npz")
    assert data is not None
    return np.load(io.BytesIO(data))


def _file_name(name: str, number: int) -> str:
    return f"{number:05}.{name}"
