"""Where examples come from: each source gives its rows as examples, and says what they are for the cache's key."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.conversations import preprocessing
from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import BadExample, Example
from llmtrain.conversations.rows import Row, expand, file_rows, hf_rows, identity_of_dataset, identity_of_files
from llmtrain.data.finetuning.config import FinetuningDatasetConfig, FinetuningStreamConfig
from llmtrain.redaction import without_password

if TYPE_CHECKING:
    from llmtrain.data.finetuning.mds_rows import MDSRows


@dataclass(frozen=True)
class Source:
    """A source of examples."""

    name: str
    """Its name in `streams`; empty for a single one."""
    config: FinetuningStreamConfig
    """What the recipe says, with what it takes from the dataset."""
    place: str
    """For messages: files, dataset or folder."""
    identity: str
    """Stable text that is another one when the examples are: data, preprocessing, limit."""
    rows: Callable[[], Iterable[Row]]
    """Reads the rows, from the first one."""
    token_encoding: str
    """Integer type of ids that come as bytes."""
    count: Callable[[], int | None]
    """Roughly the number of rows, where that is cheap to know."""
    shards: "MDSRows | None" = None
    """Where the rows stand, for MDS shards: any row can be read."""

    def describe(self) -> str:
        """For messages: name and place."""
        return f"stream {self.name!r} ({self.place})" if self.name else self.place

    def rough_rows(self) -> int | None:
        """Roughly how many rows will be read; None when that would be dear to know."""
        count = self.count()
        return count if count is None or self.config.limit is None else min(count, self.config.limit)

    def examples(self) -> Iterator[tuple[str, Example | BadExample]]:
        """The place of each row, with its example or what is wrong with it.

        Raises:
            UserError: the rows cannot be read, or the preprocessing function cannot be found.
        """
        preprocess = self.preprocess()
        for row in islice(self.rows(), self.config.limit):
            yield row.place, self.example(row, preprocess)

    def preprocess(self) -> Callable[[Mapping[str, Any]], Any]:
        """What is done to a row's data before it is looked at.

        Raises:
            UserError: the preprocessing function cannot be found.
        """
        return preprocessing.resolve(self.config.preprocessing_fn, default_for=self.config.hf_name)

    def example(self, row: Row, preprocess: Callable[[Mapping[str, Any]], Any]) -> Example | BadExample:
        """The example of a row, or what is wrong with it."""
        if row.data is None:
            return row.problem or BadExample("unreadable row")
        try:
            return parse(preprocess(row.data), token_encoding=self.token_encoding)
        except BadExample as problem:
            return problem


def open_sources(dataset: FinetuningDatasetConfig, cache: Path) -> list[Source]:
    """The sources of a dataset; what can be checked before anything is read is checked.

    Args:
        dataset: of the recipe.
        cache: folder for shards that are downloaded and have no `local`.

    Raises:
        UserError: a file, folder, dataset or function is not there.
    """
    return [_open(dataset, name, key, config, cache) for name, key, config in dataset.sources()]


def _open(dataset: FinetuningDatasetConfig, name: str, key: str, config: FinetuningStreamConfig, cache: Path) -> Source:
    preprocessing.resolve(config.preprocessing_fn, default_for=config.hf_name)  # a name that is wrong is told now
    made_by = preprocessing.identity(config.preprocessing_fn, default_for=config.hf_name)

    def source(place: str, identity: str, rows: Callable[[], Iterable[Row]], count: Callable[[], int | None]) -> Source:
        parts = [*config.kinds(), identity, made_by, config.limit, dataset.token_encoding_type]
        return Source(name, config, place, json.dumps(parts), rows, dataset.token_encoding_type, count)

    if config.files:
        return source(
            ", ".join(config.files),
            identity_of_files(config.files),
            partial(file_rows, config.files),
            partial(_lines, config.files),
        )
    if config.hf_name is not None:
        asked = (config.hf_name, config.split or "", config.hf_kwargs, config.safe_load)
        place = f"{without_password(config.hf_name)}[{config.split}]"
        return source(place, identity_of_dataset(*asked), partial(hf_rows, *asked), _unknown)

    from llmtrain.data.finetuning.mds_rows import MDSRows  # imports streaming, and with it torch

    shards = MDSRows(config, key, cache, dataset.allow_unsafe_types)
    opened = source(shards.stream.describe(), shards.identity(), shards.__iter__, shards.__len__)
    return replace(opened, shards=shards)


def _unknown() -> None:
    """Counting the rows would take as long as reading them."""


def _lines(patterns: Iterable[str]) -> int | None:
    """Lines of plain .jsonl files; None when others are among them."""
    lines = 0
    for path in expand(list(patterns)):
        if path.suffix != ".jsonl":
            return None
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                lines += chunk.count(b"\n")
    return lines
