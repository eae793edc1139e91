"""Pieces of a source, read as documents."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import PurePosixPath

from llmtrain.compressed import bare_suffix
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import Document
from llmtrain.prep.fragments import LONG, fragments
from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.hugging_face import hugging_face_rows
from llmtrain.prep.readers.jsonl import jsonl_rows
from llmtrain.prep.readers.parquet import parquet_rows
from llmtrain.prep.readers.python_literals import python_literals_rows
from llmtrain.prep.readers.row import Row
from llmtrain.prep.readers.text import text_rows

__all__ = ["BadInput", "kind_of", "read_piece"]


def read_piece(source: SourceConfig, piece: Piece, bad: BadInput) -> Iterator[Document]:
    """The documents of a piece, in their order; long ones in parts (`fragments`), so that memory stays flat.

    What cannot be read goes to `bad`. A file that breaks off gives what stands before the break.

    Raises:
        UserError: `bad` raises it; or a file has changed since the plan was made; or the disk or network fails.
    """
    if source.join is not None:
        yield from _joined(source, piece, bad)
        return
    n_bytes = 0
    for n_documents, (key, row) in enumerate(_keyed_rows(source, piece, bad), 1):
        n_bytes += row.n_bytes
        if piece.max_bytes is not None and n_bytes > piece.max_bytes:
            return
        if isinstance(row.text, str) and len(row.text) <= LONG:
            yield Document(row.text, row.n_bytes, key, row.place)
        else:
            yield from _in_parts(iter([row.text]) if isinstance(row.text, str) else row.text(), key, row.place)
        if n_documents == piece.max_documents:
            return


def kind_of(source: SourceConfig, file: InputFile) -> str:
    """The format that a file of a source is read as: `text`, `jsonl`, `parquet` or `python_literals`."""
    if source.format != "auto":
        return source.format
    suffix = bare_suffix(PurePosixPath(file.name))
    return "jsonl" if suffix in {".jsonl", ".ndjson", ".json"} else "parquet" if suffix == ".parquet" else "text"


def _keyed_rows(source: SourceConfig, piece: Piece, bad: BadInput) -> Iterator[tuple[str, Row]]:
    if source.hf_name is not None:
        for shard, row in hugging_face_rows(source, piece, bad):
            yield f"{source.hf_name}\0{shard}/{row.position}", row
        return
    (file,) = piece.files
    for row in _rows(source, file, piece, bad):
        yield f"{file.name}\0{row.position}", row


def _rows(source: SourceConfig, file: InputFile, piece: Piece, bad: BadInput) -> Iterator[Row]:
    kind = kind_of(source, file)
    if kind == "jsonl":
        return jsonl_rows(file, piece, source.text_column, bad)
    if kind == "parquet":
        return parquet_rows(file, piece, source.text_column, bad)
    return python_literals_rows(file, bad) if kind == "python_literals" else text_rows(file, bad)


def _joined(source: SourceConfig, piece: Piece, bad: BadInput) -> Iterator[Document]:
    """The one document of a piece: texts are a blank line apart."""
    name = piece.files[0].name
    path = piece.files[0].path
    if source.join == "folder" and "/" in name:
        first = name.partition("/")[0]
        path, name = path.removesuffix(name) + first, first
    chunks = _joined_chunks(source, piece, bad)
    for first in chunks:  # none if nothing could be read
        yield from _in_parts(chain([first], chunks), f"{name}\0", path)


def _joined_chunks(source: SourceConfig, piece: Piece, bad: BadInput) -> Iterator[str]:
    between = ""
    for file in piece.files:
        header = "" if source.header is None else source.header.replace("{path}", file.name) + "\n"
        for row in _rows(source, file, Piece((file,)), bad):
            yield between + header
            between, header = "\n\n", ""
            if isinstance(row.text, str):
                yield row.text
            else:
                yield from row.text()


def _in_parts(chunks: Iterator[str], key: str, place: str) -> Iterator[Document]:
    """A document as parts of the length that `fragments` gives; as a whole if that is one."""
    document = partial(_document, key=key, place=place)
    waiting: str | None = None
    first = True
    for text in fragments(chunks):
        if waiting is not None:
            yield document(waiting)._replace(part="first" if first else "middle")
            first = False
        waiting = text
    if waiting is not None:
        yield document(waiting)._replace(part="whole" if first else "last")


def _document(text: str, *, key: str, place: str) -> Document:
    return Document(text, len(text) if text.isascii() else len(text.encode()), key, place)
