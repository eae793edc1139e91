"""A document on its way from a source to the shards."""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Part = Literal["whole", "first", "middle", "last"]


class Document(NamedTuple):
    """A document, or a part of a long one; the parts of one follow each other."""

    text: str
    n_bytes: int
    """Length of the text in UTF-8."""
    key: str
    """Which document of its source this is: the file's name within the source and the place in it, whatever the size of
    the partitions. Decides the split."""
    place: str
    """File and line, row or byte, for messages."""
    part: Part = "whole"
    """Whether the text is all of the document, or which part of it."""


def whole(documents: Iterable[Document]) -> Iterator[Document]:
    """Parts put together again, for what must see a whole document at once."""
    parts: list[Document] = []
    for document in documents:
        if document.part == "whole":
            yield document
            continue
        parts.append(document)
        if document.part == "last":
            text = "".join(part.text for part in parts)
            yield Document(text, sum(part.n_bytes for part in parts), document.key, parts[0].place)
            parts = []
