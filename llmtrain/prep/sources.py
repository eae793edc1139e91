"""Sources of documents: files of several kinds, and datasets of the Hugging Face hub."""

from collections.abc import Iterator

from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import Document, whole
from llmtrain.prep.inputs import describe_inputs, files_of, named_files_of, pieces_of
from llmtrain.prep.readers import BadInput, read_piece

__all__ = ["Document", "describe_inputs", "documents", "files_of", "named_files_of"]


def documents(source: SourceConfig) -> Iterator[Document]:
    """The documents of a source, in an order that is always the same; stops at its `max_documents` and `max_bytes`.

    Raises:
        UserError: no file matches, or a file or row is malformed (named with file and line or row).
    """
    bad = BadInput("fail")
    for piece in pieces_of(source, 1 << 40):
        yield from whole(read_piece(source, piece, bad))
