"""Datasets of the Hugging Face hub, read as streams: a document a row."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from llmtrain.errors import UserError
from llmtrain.foreign_datasets import load_dataset
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.plan import Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.row import BadRow, Row, good_row, text_of


def n_shards(source: SourceConfig) -> int:
    """How many shards (usually files) the dataset has.

    Raises:
        UserError: it cannot be opened.
    """
    return int(_open(source).n_shards)


def hugging_face_rows(source: SourceConfig, piece: Piece, bad: BadInput) -> Iterator[tuple[int, Row]]:
    """The number of the shard and the row, for the shards of the piece: one, or all.

    Raises:
        UserError: the dataset cannot be opened or read, or it has another number of shards than was planned with.
    """
    n = n_shards(source)
    if piece.unit == "shard" and piece.stop != n:
        raise UserError(f"{_name(source)} has changed since the work was planned: {piece.stop} shards then, {n} now")
    for shard in [piece.start] if piece.unit == "shard" else range(n):
        for row in _shard_rows(source, shard, n, bad):
            yield shard, row


def _shard_rows(source: SourceConfig, shard: int, n: int, bad: BadInput) -> Iterator[Row]:
    from datasets.distributed import split_dataset_by_node

    # `IterableDataset.shard` came with datasets 3.1; as many nodes as shards is the same in all versions.
    iterator = iter(split_dataset_by_node(_open(source), rank=shard, world_size=n))
    column = source.text_column
    number = 0
    while True:
        place = f"{_name(source)}, shard {shard}, row {number}"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as problem:  # it raises whatever its back-ends raise, a broken connection among them
            raise UserError(f"{place}: {type(problem).__name__}: {problem}") from problem
        try:
            good = good_row(number, text_of(row, column), place, bad)
        except BadRow as problem:
            bad(place, str(problem))
        else:
            if good is not None:
                yield good
        number += 1


def _name(source: SourceConfig) -> str:
    return f"source {source.name!r} ({source.hf_name}, split {source.split})"


def _open(source: SourceConfig) -> Any:
    kwargs = json.dumps(source.hf_kwargs, sort_keys=True)
    try:
        return _load(source.hf_name, source.split, kwargs)
    except UserError as problem:
        raise UserError(f"source {source.name!r}: {problem}") from None
    except Exception as problem:  # it raises whatever its back-ends raise
        reason = f"{type(problem).__name__}: {problem}"
        raise UserError(
            f"source {source.name!r}: the dataset {source.hf_name!r} cannot be opened: {reason}"
        ) from problem


@lru_cache(maxsize=4)
def _load(name: str, split: str, kwargs: str) -> Any:
    return load_dataset(name, split=split, streaming=True, **json.loads(kwargs))
