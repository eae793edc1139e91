"""Stages that must see all documents before they can judge one: passes over the corpus before it is tokenised.

A pass signs every partition by itself, and then reduces the signatures of all to the documents that each partition must
drop. The stages before it in the recipe are applied to what it signs, earlier passes included.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmtrain.prep.documents import Document
from llmtrain.prep.stages import copies, exact, minhash
from llmtrain.prep.stages.config import ExactDedup, MinHashDedup, StageConfig
from llmtrain.prep.stages.pipeline import Pipeline, pass_name


def passes(stages: Sequence[StageConfig]) -> list[str]:
    """The names of the passes, in the order in which they must be carried out (`0-exact_dedup`)."""
    return [pass_name(i, stage) for i, stage in enumerate(stages) if isinstance(stage, ExactDedup | MinHashDedup)]


def sign(
    stages: Sequence[StageConfig],
    name: str,
    documents: Iterator[Document],
    drops: Mapping[str, NDArray[np.int64]],
) -> dict[str, NDArray[np.uint64]]:
    """The signatures of a partition's documents that reach a pass's stage.

    Args:
        stages: all of the recipe's.
        name: of the pass.
        documents: the partition's.
        drops: of the earlier passes, for this partition: pass -> ordinals.

    Returns:
        Arrays, with an entry for each of these documents, to hand to `reduce`.
    """
    index, stage = _stage_of(stages, name)
    reaching = Pipeline(stages[:index], drops).run(documents)
    return exact.sign(stage, reaching) if isinstance(stage, ExactDedup) else minhash.sign(stage, reaching)


def reduce(
    stages: Sequence[StageConfig], name: str, parts: Sequence[copies.Part], sources: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    """What each partition must drop, partition after partition.

    Memory: a byte a document, and 70 bytes for each of at most 2^26 hashes at a time (4.5 GiB; near copies among two
    million documents take 350 MB), and, for near copies, 100 bytes a document that has any.

    Args:
        stages: all of the recipe's.
        name: of the pass.
        parts: load the signatures of each partition, in the plan's order; each is called several times. What they load
            may be lazy (`np.load` of an .npz file is): a pass over it takes one array or two.
        sources: number of the source that each partition belongs to.

    Returns:
        For each partition the ordinals of documents to drop, sorted: counted among those that `sign` saw.
    """
    _, stage = _stage_of(stages, name)
    within = list(sources) if stage.within == "source" else None
    names = ["high", "low"] if isinstance(stage, ExactDedup) else minhash.bucket_names(stage)
    offsets = copies.offsets_of(parts, names[0])
    dropped = np.zeros(offsets[-1], bool)
    if isinstance(stage, ExactDedup):
        for found, _ in copies.links(parts, offsets, names, within):
            dropped[found] = True
    else:
        dropped[copies.clusters(_links_of_buckets(parts, offsets, names, within))] = True
    for number in range(len(parts)):
        yield np.flatnonzero(dropped[offsets[number] : offsets[number + 1]]).astype(np.int64)


def _links_of_buckets(
    parts: Sequence[copies.Part], offsets: copies.Positions, names: Sequence[str], within: Sequence[int] | None
) -> Iterator[tuple[copies.Positions, copies.Positions]]:
    at_once = copies.AT_ONCE // max(1, int(offsets[-1]))  # buckets that fit into memory
    for start in range(0, len(names), max(1, at_once)):
        some = names[start : start + max(1, at_once)]
        loaded = parts
        if at_once:  # read the signatures once for all of these
            kept = [{name: part[name] for name in some} for part in (load() for load in parts)]
            loaded = [partial(dict, arrays) for arrays in kept]
        for name in some:
            yield from copies.links(loaded, offsets, [name], within)


def _stage_of(stages: Sequence[StageConfig], name: str) -> tuple[int, ExactDedup | MinHashDedup]:
    for index, stage in enumerate(stages):
        if isinstance(stage, ExactDedup | MinHashDedup) and pass_name(index, stage) == name:
            return index, stage
    raise ValueError(f"no stage has a pass {name!r}")
