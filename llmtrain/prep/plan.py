"""How a recipe's input is cut into partitions, the units of work."""

from dataclasses import dataclass
from typing import Literal


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
