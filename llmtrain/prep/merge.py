"""Finished partitions become the output: what was left over in each is joined, and every split gets its index."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.shards import MANIFEST
from llmtrain.errors import UserError
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.job import Job
from llmtrain.prep.mds import index_content
from llmtrain.prep.mixture import NAME as MIXTURE
from llmtrain.prep.mixture import mixture_yaml
from llmtrain.prep.partition import finished_partitions, read_partitions, shard_files, shard_writer, splits_of
from llmtrain.prep.readers import BadInput
from llmtrain.prep.split import PartCounts, SplitCounts, SplitPart, join_tails, total
from llmtrain.prep.work import Work

_AT_ONCE = 1 << 18  # tokens


@dataclass(frozen=True)
class Merged:
    """What was made."""

    content: dict[str, Any]
    """`prep.json`."""
    splits: Mapping[str, SplitCounts]
    """By folder below the output."""
    bad_input: BadInput
    """What was left out, under `on_error: skip`."""


def missing_partitions(job: Job) -> list[int]:
    """The partitions that are not finished yet."""
    return sorted(set(range(len(job.plan().partitions))) - finished_partitions(job.work()))


def merge(job: Job) -> Merged:
    """Make the output of a job whose partitions are all finished, and make it visible.

    Killed anywhere, it can be called again.

    Raises:
        UserError: a split would be empty; or something that is not the tool's is at the output's place by now.
    """
    work, plan = job.work(), job.plan()
    with work.temporary() as folder:
        last = len(plan.partitions)
        made = _Sum(work, last, folder)
        joined: dict[str, SplitPart] = {}
        for split in _splits(job.recipe):
            writer = shard_writer(job.recipe, plan, folder / split, last)
            joined[split] = join_tails(writer, job.recipe.max_seq_len, plan.facts["vocab_size"], made.tails(split))
        work.commit(shard_files(folder, joined), "done/tails.json", b"{}")
    counts = {split: made.total(split, joined[split]) for split in joined}
    for split, count in counts.items():
        if not count.samples:
            work.discard()  # no rerun can make another thing of it
            raise _empty(split, count, job.recipe)
    content = {
        "format": manifest.FORMAT,
        "recipe": manifest.recipe_content(job.recipe),  # the plan's, but for the weights, which are those of now
        "inputs": plan.inputs,
        "partitions": len(plan.partitions),
        "bad_input": made.bad_input.as_dict(),
        "hard_cuts": made.hard_cuts,
        **made.stages,
        **plan.facts,
        "splits": {split: count.as_dict() for split, count in counts.items()},
    }
    files = {
        f"{split}/index.json": index_content([*made.shards[split], *part.shards], plan.facts)
        for split, part in joined.items()
    }
    mixture = mixture_yaml(job.recipe)
    if mixture is not None:
        files[MIXTURE] = mixture.encode()
    files[MANIFEST] = manifest.to_json(content)
    work.publish(files)
    return Merged(json.loads(files[MANIFEST]), counts, made.bad_input)


class _Sum:
    """All partitions of a plan, read one after another: only what cannot be added up is kept, tails in a folder."""

    def __init__(self, work: Work, n_partitions: int, folder: Path) -> None:
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self.hard_cuts = 0
        self._counts: dict[str, list[PartCounts]] = {}
        self._token_counts: dict[str, NDArray[np.int64]] = {}
        self._tails: dict[str, tuple[Path, np.dtype[Any]]] = {}
        bad, stages = [], []
        for partition in read_partitions(work, n_partitions):
            bad.append(partition.bad_input)
            stages.append(partition.stages)
            self.hard_cuts += partition.hard_cuts
            for split, part in partition.splits.items():
                self.shards.setdefault(split, []).extend(part.shards)
                self._counts.setdefault(split, []).append(part.counts)
                path, _ = self._tails.setdefault(split, (folder / f".tails-{len(self._tails)}", part.tail.dtype))
                with path.open("ab") as file:
                    file.write(part.tail.tobytes())
                before = self._token_counts.get(split)
                self._token_counts[split] = part.token_counts if before is None else before + part.token_counts
        self.bad_input = BadInput.joined(bad)
        self.stages: dict[str, Any] = {}
        if any(stages):
            from llmtrain.prep.stages import merge_reports

            self.stages = merge_reports(stages)

    def tails(self, split: str) -> Iterator[NDArray[Any]]:
        """Joined, in the order of the plan, in pieces."""
        if split in self._tails:
            path, dtype = self._tails[split]
            with path.open("rb") as file:
                while len(tokens := np.fromfile(file, dtype, _AT_ONCE)):
                    yield tokens

    def total(self, split: str, joined: SplitPart) -> SplitCounts:
        """The counts of a split, with the rows that its tails gave."""
        before = self._token_counts.get(split)
        tokens = joined.token_counts if before is None else before + joined.token_counts
        return total([*self._counts.get(split, []), joined.counts], tokens)


def _splits(recipe: PrepRecipe) -> list[str]:
    """The output's splits, in the order of the sources."""
    return list(dict.fromkeys(split for source in recipe.sources for split in splits_of(recipe, source)))


def _empty(split: str, counts: SplitCounts, recipe: PrepRecipe) -> UserError:
    short = f" ({counts.dropped_documents:,} more are below min_document_tokens)" * bool(counts.dropped_documents)
    return UserError(
        f"{split} would be empty: {counts.documents:,} documents with {counts.tokens:,} tokens{short} fill no "
        f"row of {recipe.max_seq_len}. More text, another val_fraction, or a shorter max_seq_len is needed"
    )
