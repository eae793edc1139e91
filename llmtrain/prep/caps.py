"""Caps of a source: the pieces up to the document that would be one too many."""

from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from llmtrain.compressed import is_compressed
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers import BadInput, kind_of, read_piece
from llmtrain.prep.readers.files import opened


def up_to_cap(source: SourceConfig, pieces: Sequence[Piece], on_error: Literal["fail", "skip"]) -> Iterator[Piece]:
    """The pieces of files up to the one that `max_documents` or `max_bytes` falls in, which is cut there.

    The caps count good documents, in their order, so everything up to them is read: about 3 s per GB of jsonl. Sizes
    decide, and nothing is read, where all files are uncompressed and not larger than `max_bytes`, and where all are
    uncompressed text, unless bad ones are to be skipped.

    Raises:
        UserError: see `read_piece`.
    """
    if source.join is None and not any(is_compressed(file.name) for piece in pieces for file in piece.files):
        kinds = {kind_of(source, file) for piece in pieces for file in piece.files}
        total = sum(piece.size for piece in pieces)
        # Text is no longer than the lines that it is written in.
        if kinds <= {"text", "jsonl"} and source.max_documents is None and total <= (source.max_bytes or 0):
            return iter(pieces)
        if kinds == {"text"} and on_error == "fail":
            return _by_size(source, pieces)
    return _by_reading(source, pieces, on_error)


def _by_size(source: SourceConfig, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Pieces of text files up to the cap, by the sizes of the files."""
    n_bytes = 0
    for piece in pieces[: source.max_documents]:
        n_bytes += piece.size
        if source.max_bytes is not None:
            n_bytes -= _byte_order_mark(piece.files[0])
            if n_bytes > source.max_bytes:
                return
        yield piece


def _byte_order_mark(file: InputFile) -> int:
    """Its length, if the file begins with one: it does not belong to the text."""
    try:
        with opened(file) as data:
            return len(BOM_UTF8) if data.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    except OSError:  # whoever reads it says what is wrong with it
        return 0


def _by_reading(source: SourceConfig, pieces: Sequence[Piece], on_error: Literal["fail", "skip"]) -> Iterator[Piece]:
    documents_left, bytes_left = source.max_documents, source.max_bytes
    for piece in pieces:
        n_documents = length = 0
        full = False
        for document in read_piece(source, piece, BadInput(on_error)):
            if document.part in {"whole", "first"}:
                if n_documents == documents_left:
                    full = True
                    break
                n_documents, length = n_documents + 1, 0
            length += document.n_bytes
            if bytes_left is not None and length > bytes_left:
                full, n_documents = True, n_documents - 1
                break
            if bytes_left is not None and document.part in {"whole", "last"}:
                bytes_left -= length
        if not full:
            yield piece
        else:
            if n_documents:
                yield replace(piece, max_documents=n_documents)
            return
        if documents_left is not None:
            documents_left -= n_documents
