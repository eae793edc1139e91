"""How a recipe's input is cut into partitions, the units of work."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

FORMAT = 1
"""Of the unfinished work; another version of llmtrain does not go on with it when this differs."""


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the work was planned."""

    path: str
    """Path on this machine, or URL."""
    name: str
    """Path within the source, the same on every machine."""
    size: int
    """Bytes."""
    mtime: int
    """When it was last changed, in nanoseconds; 0 where the storage does not say."""


@dataclass(frozen=True)
class Piece:
    """What a reader reads at once: a file or a range of it, the files of a joined document, or a part of a dataset."""

    files: tuple[InputFile, ...]
    """One file; several only for a document that is joined of them; none for a Hugging Face dataset."""
    unit: Literal["all", "bytes", "rows", "row_groups", "shard"] = "all"
    """What `start` and `stop` count: nothing, bytes of a file of lines, row groups of a parquet file. `shard`: `start`
    is the number of a shard of a Hugging Face dataset that has `stop` of them."""
    start: int = 0
    stop: int | None = None
    max_documents: int | None = None
    """Stop after so many documents: where a source's cap falls into this piece."""
    max_bytes: int | None = None
    """Stop before the document that would go beyond this many bytes."""
    size: int = 0
    """Bytes to read, as far as that is known: what partitions are measured by."""


@dataclass(frozen=True)
class Partition:
    """A unit of work: pieces of one source, read one after another."""

    source: int
    """Position among the recipe's sources."""
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes to read, as far as that is known."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """All work on an output, fixed before the first partition is made: what decides on the bytes that are written."""

    recipe: Mapping[str, Any]
    """The part of the recipe that decides on them (`manifest.recipe_content`)."""
    inputs: Mapping[str, Any]
    """What was read, for `prep.json` (`manifest.inputs_content`)."""
    tokenizer: str
    """Name, or absolute path, of the tokenizer; empty when it is trained here, to `OUT/tokenizer`."""
    facts: Mapping[str, Any]
    """Of the tokenizer and the rows, as `index.json` and `prep.json` have them: `vocab_size`, `eos_token_id`, ..."""
    core: Literal["tiktoken", "tokenizers"]
    """The library that tokenises; both give the same ids."""
    partitions: tuple[Partition, ...]
    """In the order of the output."""
    replaces: bool = False
    """Whether what lies at the output's place may be replaced: `--overwrite` was given."""
    tokenizer_sha256: str = ""
    """Of its `tokenizer.json`: on another machine the name may stand for another version."""
    format: int = FORMAT

    @cached_property
    def size(self) -> int:
        """Bytes to read, as far as that is known."""
        return sum(partition.size for partition in self.partitions)

    def to_json(self) -> bytes:
        """One line for each partition."""
        content = {key: value for key, value in vars(self).items() if key not in {"partitions", "size"}}
        head = json.dumps(content, sort_keys=True)
        lines = ",\n".join(json.dumps(asdict(partition), sort_keys=True) for partition in self.partitions)
        return f'{head[:-1]}, "partitions": [\n{lines}\n]}}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Plan":
        """What `to_json` wrote.

        Raises:
            ValueError: it is not that.
        """
        content = json.loads(data)
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            partitions = tuple(
                Partition(one["source"], tuple(_piece(piece) for piece in one["pieces"]))
                for one in content.pop("partitions")
            )
            return cls(**content, partitions=partitions)
        except (TypeError, KeyError, AttributeError) as problem:
            raise ValueError(repr(problem)) from problem


def _piece(content: dict[str, Any]) -> Piece:
    files = tuple(InputFile(**file) for file in content.pop("files"))
    return Piece(files=files, **content)
