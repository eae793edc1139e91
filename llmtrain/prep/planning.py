"""From a recipe to the plan of its work; and whether unfinished work is still of that plan."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtrain.compressed import is_compressed
from llmtrain.prep import manifest
from llmtrain.prep.config import PrepRecipe, SourceConfig
from llmtrain.prep.documents import Document
from llmtrain.prep.encode import choose_core, file_digest, open_encoder
from llmtrain.prep.inputs import input_bytes, input_files, pieces_of
from llmtrain.prep.job import Job
from llmtrain.prep.partition import is_held_out
from llmtrain.prep.plan import Partition, Piece, Plan
from llmtrain.prep.readers import BadInput, read_piece
from llmtrain.prep.train_tokenizer import train_tokenizer
from llmtrain.prep.work import PLAN, Work
from llmtrain.tokenizer import fingerprint

_MIB = 1 << 20
_MOST_PARTITIONS = 4096  # of a large corpus: what each costs beside its work must stay small, and so must the plan
_SAMPLE_CHARACTERS = 500_000
_SAMPLE_PIECES = 4


def make_plan(job: Job, inputs: Mapping[str, Any], console: Console, *, replaces: bool) -> Plan:
    """Plan a recipe, and write the plan; a tokenizer that the recipe trains is trained here.

    Raises:
        UserError: a source or the tokenizer has a mistake.
    """
    recipe, work = job.recipe, job.work()
    size = partition_bytes(recipe)
    pieces = [pieces_of(source, size, recipe.on_error) for source in recipe.sources]
    if recipe.tokenizer.train is not None:
        _train_tokenizer(recipe, work, pieces, console)
    partitions = tuple(Partition(source, group) for source, some in enumerate(pieces) for group in grouped(some, size))
    return write_plan(job, inputs, console, sample=_sample(recipe, pieces), partitions=partitions, replaces=replaces)


def write_plan(
    job: Job,
    inputs: Mapping[str, Any],
    console: Console,
    *,
    sample: Iterable[str],
    partitions: tuple[Partition, ...],
    replaces: bool,
) -> Plan:
    """Write the plan of partitions; a tokenizer that the recipe trains is there already.

    Args:
        job: to plan.
        inputs: what is read, for `prep.json`.
        console: is told when the faster library cannot be taken.
        sample: of the corpus, for the choice of the library that tokenises.
        partitions: in the order of the output.
        replaces: whether what lies at the output's place may be replaced.

    Raises:
        UserError: the tokenizer has a mistake.
    """
    recipe, work = job.recipe, job.work()
    name = ""
    if recipe.tokenizer.name is not None:
        path = Path(recipe.tokenizer.name).expanduser()
        name = str(path.absolute()) if path.is_dir() else recipe.tokenizer.name
    opened = name or str(work.local("tokenizer"))
    encoder = open_encoder(opened, eos=recipe.eos, bos=recipe.bos)
    core, reason = choose_core(opened, sample)
    if reason:
        console.print(f"tokenizing with `tokenizers`, not with tiktoken's faster core: {reason}", highlight=False)
    plan = Plan(
        recipe=manifest.recipe_content(recipe),
        inputs=inputs,
        tokenizer=name,
        facts={
            "tokenizer_fingerprint": fingerprint(opened),
            "vocab_size": encoder.vocab_size,
            "eos_token_id": encoder.eos,
            "bos_token_id": encoder.bos,
            "max_seq_len": recipe.max_seq_len,
            "cut": recipe.cut,
        },
        core=core,
        partitions=partitions,
        replaces=replaces,
        tokenizer_sha256=file_digest(opened),
    )
    work.write(PLAN, plan.to_json())
    return plan


def partition_bytes(recipe: PrepRecipe) -> int:
    """The recipe's, or a sixteenth of the input: at least 1 MiB, and at most 32 MiB or what makes 4,096 partitions."""
    if recipe.partition_bytes is not None:
        return recipe.partition_bytes
    total = input_bytes(recipe.sources)
    return max(_MIB, min(total // 16, max(32 * _MIB, total // _MOST_PARTITIONS)))


def grouped(pieces: Sequence[Piece], size: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces that follow each other in groups of at most `size` bytes; a larger one is by itself.

    Nobody knows how large the shards of a dataset of the hub are: each is by itself, unless there are too many.
    """
    of_hub = sum(piece.unit == "shard" for piece in pieces)
    group: list[Piece] = []
    total = 0
    for piece in pieces:
        together = total + piece.size <= size
        if of_hub:
            together = len(group) < -(-of_hub // _MOST_PARTITIONS)
        if group and not together:
            yield tuple(group)
            group, total = [], 0
        group.append(piece)
        total += piece.size
    if group:
        yield tuple(group)


def bytes_to_read(plan: Plan, numbers: Sequence[int]) -> int | None:
    """How much text partitions hold, for the time left; None when that cannot be known beforehand."""
    total = 0
    for number in numbers:
        for piece in plan.partitions[number].pieces:
            compressed = any(is_compressed(file.name) or file.name.endswith(".parquet") for file in piece.files)
            if not piece.files or (compressed and piece.unit == "all"):
                return None
            total += piece.size if piece.max_bytes is None else min(piece.size, piece.max_bytes)
    return total


def changes(plan: Plan, recipe: PrepRecipe, inputs: Mapping[str, Any]) -> list[str]:
    """What is not any more as it was when the plan was made: keys of the recipe, and files."""
    before, now = manifest.deciding(plan.recipe), manifest.deciding(manifest.recipe_content(recipe))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        return changed
    for number, source in enumerate(recipe.sources):
        planned = {
            file
            for partition in plan.partitions
            if partition.source == number
            for piece in partition.pieces
            for file in piece.files
        }
        current = set(input_files(source))
        different = sorted(file.path for file in planned - current)
        if different:
            changed.append(f"the files of {source.name} ({', '.join(different[:3])}{', ...' * (len(different) > 3)})")
        elif plan.inputs["sources"].get(source.name) != inputs["sources"][source.name]:
            changed.append(f"the files of {source.name}")
    if not changed and plan.inputs != json.loads(json.dumps(inputs)):
        stages = plan.inputs.get("stages") != inputs.get("stages")
        changed.append("the stages' files and functions" if stages else "the tokenizer's files")
    return changed


def _train_tokenizer(recipe: PrepRecipe, work: Work, pieces: Sequence[Sequence[Piece]], console: Console) -> None:
    cfg = recipe.tokenizer.train
    assert cfg is not None
    start = time.monotonic()
    console.print(f"training a tokenizer of {cfg.vocab_size:,} tokens ...", highlight=False)
    per_source = cfg.max_bytes // len(recipe.sources)

    def sample() -> Iterator[str]:
        for source, some in zip(recipe.sources, pieces, strict=True):
            left = per_source
            for document in _read(source, some, BadInput(recipe.on_error)):
                if is_held_out(recipe, source, document.key):
                    continue
                yield document.text[:left]
                left -= document.n_bytes
                if left <= 0:
                    break

    with work.temporary() as folder:
        train_tokenizer(sample(), cfg, folder)
        files = {f"tokenizer/{path.name}": path for path in sorted(folder.iterdir())}
        work.commit(files, "done/tokenizer.json", b"{}")
    console.print(f"trained in {time.monotonic() - start:.1f} s", highlight=False)


def _sample(recipe: PrepRecipe, pieces: Sequence[Sequence[Piece]]) -> Iterator[str]:
    """Documents from the beginnings of some pieces of each source; what is bad is left to the partitions."""
    for source, some in zip(recipe.sources, pieces, strict=True):
        n = min(len(some), _SAMPLE_PIECES) if source.hf_name is None else 1
        for i in range(n):
            left = _SAMPLE_CHARACTERS // (len(recipe.sources) * n)
            for document in _read(source, [some[i * len(some) // n]], BadInput("skip")):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break


def _read(source: SourceConfig, pieces: Sequence[Piece], bad: BadInput) -> Iterator[Document]:
    for piece in pieces:
        yield from read_piece(source, piece, bad)
