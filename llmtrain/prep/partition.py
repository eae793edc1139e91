"""The unit of work: one partition of the plan, from its pieces of input to its shards.

What it writes depends on the job and its number alone: not on who does it, where, when, or how often.
"""

import io
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError
from llmtrain.prep.config import PrepRecipe, SourceConfig
from llmtrain.prep.documents import Document
from llmtrain.prep.encode import Core, Encoder, batches, file_digest, open_encoder
from llmtrain.prep.in_threads import in_threads
from llmtrain.prep.input_documents import documents_of
from llmtrain.prep.job import Job
from llmtrain.prep.mds import ShardWriter, token_dtype
from llmtrain.prep.pack import Cutter, DocumentCutter, Packer
from llmtrain.prep.passes import SIGNED, read_drops
from llmtrain.prep.plan import Plan
from llmtrain.prep.readers import BadInput
from llmtrain.prep.split import PartCounts, SplitPart, SplitWriter, is_validation
from llmtrain.prep.work import Work
from llmtrain.tokenizer import fingerprint

DONE = "done/tokens"
"""Folder of the markers of finished partitions."""
_ARRAYS = "tokens"


def make_partition(job: Job, number: int, advance: Callable[[int], None] | None = None) -> None:
    """Make a partition, unless it is there.

    Args:
        job: what it belongs to; planned.
        number: position among the plan's partitions.
        advance: is called with bytes of text as they are done.

    Raises:
        UserError: bad input, a full disk, or an input that has changed since it was planned.
    """
    if not is_made(job, number):
        bad = BadInput(job.recipe.on_error)
        write_partition(job, number, documents_of(job, number, bad, advance), bad)


def is_made(job: Job, number: int) -> bool:
    """Whether a partition is there."""
    return job.work().read(_marker(number)) is not None


def write_partition(job: Job, number: int, documents: Iterator[Document], bad: BadInput) -> None:
    """Make a partition of documents, wherever they come from.

    Args:
        job: what it belongs to; planned.
        number: position among the plan's partitions.
        documents: all of it, in its order; of a long one the parts.
        bad: has taken note, when they have been read, of what could not be.

    Raises:
        UserError: reading raises it, the disk is full, or there is another plan by now.
    """
    work = job.work()
    plan = job.plan()
    source = job.recipe.sources[plan.partitions[number].source]
    encoder = _encoder(job, plan, work)
    hard_cuts = encoder.hard_cuts
    with work.temporary() as folder:
        writers = {
            split: SplitWriter(
                shard_writer(job.recipe, plan, folder / split, number),
                _cutter(job.recipe, encoder.dtype),
                encoder,
                min_document_tokens=job.recipe.min_document_tokens,
            )
            for split in splits_of(job.recipe, source)
        }
        prefix = split_prefix(job.recipe, source)
        documents, stages_report = _through_stages(job, number, documents)
        for batch in batches(documents):
            _write(batch, encoder.encode(batch), job.recipe, source, writers, prefix)
        parts = {split: writer.finish() for split, writer in writers.items()}
        if job.plan() != plan:  # a worker that an engine lost sight of; what it made is of no use to the new plan
            raise UserError(f"{job.out}: the work has been discarded and planned anew by somebody else")
        work.write(f"{_ARRAYS}/{file_name(number)}.npz", _arrays(parts))
        content = {
            "splits": {
                split: {"counts": part.counts.as_dict(), "shards": part.shards} for split, part in parts.items()
            },
            "bad_input": bad.as_dict(),
            "hard_cuts": encoder.hard_cuts - hard_cuts,
            "stages": stages_report(),
        }
        work.commit(shard_files(folder, parts), _marker(number), json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True)
class MadePartition:
    """What is known of a finished partition."""

    splits: Mapping[str, SplitPart]
    """By the split's folder below the output."""
    bad_input: Mapping[str, Any]
    """As `BadInput.as_dict` has it."""
    hard_cuts: int
    """See `Encoder.hard_cuts`."""
    stages: Mapping[str, Any]
    """As `Pipeline.report` has it; empty without stages."""


def read_partitions(work: Work, n: int) -> Iterator[MadePartition]:
    """What `make_partition` left about partitions 0 ... n - 1, in that order.

    Raises:
        FileNotFoundError: one of them is not finished.
    """
    # The threads only fetch: numpy reads headers with `ast`, and CPython 3.11 counts the depth of its recursion for
    # all threads together ("SystemError: AST constructor recursion depth mismatch", now and then).
    for fetched in in_threads(partial(_fetch, work), range(n)):
        yield _made_partition(*fetched)


def _fetch(work: Work, number: int) -> tuple[bytes, bytes]:
    marker = work.read(_marker(number))
    data = work.read(f"{_ARRAYS}/{file_name(number)}.npz")
    if marker is None or data is None:
        raise FileNotFoundError(f"partition {number} is not finished")
    return marker, data


def _made_partition(marker: bytes, data: bytes) -> MadePartition:
    content = json.loads(marker)
    with np.load(io.BytesIO(data)) as arrays:
        splits = {
            split: SplitPart(
                PartCounts(**part["counts"]), arrays[f"tail_{i}"], arrays[f"token_counts_{i}"], part["shards"]
            )
            for i, (split, part) in enumerate(sorted(content["splits"].items()))
        }
    return MadePartition(splits, content["bad_input"], content["hard_cuts"], content["stages"])


def _marker(number: int) -> str:
    return f"{DONE}/{file_name(number)}.json"


def finished_partitions(work: Work) -> set[int]:
    """The numbers of the partitions that are there."""
    stems = (name.removesuffix(".json") for name in work.names(DONE))
    return {int(stem) for stem in stems if stem.isdecimal()}  # network file systems put names of their own there


def is_begun(work: Work) -> bool:
    """Whether a unit of work has been finished: something would be lost without it."""
    return bool(work.names(DONE) or work.names(SIGNED))


def splits_of(recipe: PrepRecipe, source: SourceConfig) -> list[str]:
    """The folders below the output that a source is written to."""
    return [split_prefix(recipe, source) + split for split in recipe.splits_of(source)]


def split_prefix(recipe: PrepRecipe, source: SourceConfig) -> str:
    """The folder of a source below the output, with a slash; empty when there is none."""
    return f"{source.name}/" if recipe.split_by_source else ""


def is_held_out(recipe: PrepRecipe, source: SourceConfig, key: str) -> bool:
    """Whether a document is for validation."""
    if source.into is not None:
        return source.into == "val"
    return is_validation(source.name, key, recipe.val_fraction)


def file_name(number: int) -> str:
    """How a partition is called in the names of files."""
    return f"{number:05}"


def shard_writer(recipe: PrepRecipe, plan: Plan, folder: Path, number: int) -> ShardWriter:
    """Writes the shards of one split of one partition."""
    return ShardWriter(
        folder,
        prefix=f"shard.{file_name(number)}",
        seq_len=recipe.max_seq_len,
        dtype=token_dtype(plan.facts["vocab_size"]),
        compression=recipe.compression,
        hashes=recipe.hashes,
        size_limit=recipe.size_limit,
    )


def shard_files(folder: Path, parts: Mapping[str, SplitPart]) -> dict[str, Path]:
    """Place in the output -> file in a folder, for the shards of splits."""
    names = [
        f"{split}/{(entry['zip_data'] or entry['raw_data'])['basename']}"
        for split, part in parts.items()
        for entry in part.shards
    ]
    return {name: folder / name for name in names}


def _through_stages(
    job: Job, number: int, documents: Iterator[Document]
) -> tuple[Iterator[Document], Callable[[], dict[str, Any]]]:
    """The documents that the recipe's stages leave, and, once those are read, the stages' report."""
    stages = job.recipe.stages
    if not stages:
        return documents, dict
    from llmtrain.prep.stages import Pipeline, passes

    pipeline = Pipeline(stages, read_drops(job.work(), passes(stages), number))
    return pipeline.run(documents), pipeline.report


def _write(
    batch: list[Document],
    ids: list[NDArray[Any]],
    recipe: PrepRecipe,
    source: SourceConfig,
    writers: Mapping[str, SplitWriter],
    prefix: str,
) -> None:
    held_out = [is_held_out(recipe, source, document.key) for document in batch]
    for split, wanted in (("train", False), ("val", True)):
        mine = [i for i, held in enumerate(held_out) if held == wanted]
        if mine:
            writers[prefix + split].add([batch[i] for i in mine], [ids[i] for i in mine])


def _cutter(recipe: PrepRecipe, dtype: np.dtype[Any]) -> Cutter:
    if recipe.cut == "documents":
        return DocumentCutter(recipe.max_seq_len, dtype, overlap=recipe.tail == "overlap")
    return Packer(recipe.max_seq_len, dtype)


def _arrays(parts: Mapping[str, SplitPart]) -> bytes:
    arrays: dict[str, NDArray[Any]] = {}
    for i, (_, part) in enumerate(sorted(parts.items())):
        arrays |= {f"tail_{i}": part.tail, f"token_counts_{i}": part.token_counts}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _encoder(job: Job, plan: Plan, work: Work) -> Encoder:
    name = plan.tokenizer or str(work.local("tokenizer"))
    planned = plan.facts["tokenizer_fingerprint"], plan.tokenizer_sha256
    return _opened(name, job.recipe.eos, job.recipe.bos, plan.core, *planned)


@lru_cache(maxsize=1)  # opening takes longer than a small partition; the fingerprint tells one from the next
def _opened(name: str, eos: bool, bos: bool, core: Core, planned: str, sha256: str) -> Encoder:
    if file_digest(name) != sha256 and fingerprint(name) != planned:  # the former is cheap
        raise UserError(
            f"tokenizer: {name!r} is another one on {socket.gethostname()} than the work was planned with. Bring the "
            "same version there, or give all machines one folder"
        )
    return open_encoder(name, eos=eos, bos=bos, core=core)
