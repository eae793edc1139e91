"""Parquet files: a document a row."""

from collections.abc import Iterator
from typing import Any

from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage, opened
from llmtrain.prep.readers.row import Row, good_row, no_column, not_text

_AT_ONCE = 1 << 22  # bytes of text
_READ = 1 << 20  # bytes; pyarrow otherwise reads all of a row group's column at once


def parquet_rows(file: InputFile, piece: Piece, column: str, bad: BadInput) -> Iterator[Row]:
    """The rows of the piece's row groups.

    Memory: some rows, about 4 MB of text, and the page that they are on are held at once, however large a row group is.
    Less than a page cannot be read. It should be about 1 MB, but writers look at its size every 1,024 rows or so: where
    documents are books, a page, and so the memory, may be hundreds of megabytes. jsonl has no such limit.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0

    def reached() -> str:
        return f" from row {number}" if number else ""

    with noting_damage(file.path, bad, reached), opened(file) as data:
        if file.size == 0:
            bad(file.path, "is empty: no parquet")
            return
        try:
            table = pyarrow.parquet.ParquetFile(data, pre_buffer=False, buffer_size=_READ)
            names = table.schema_arrow.names
            if column not in names:
                bad(file.path, str(no_column(column, names)))
                return
            if not table.metadata.num_rows:
                bad.found_empty(file.path)
            groups = range(table.num_row_groups)
            if piece.unit == "row_groups":
                groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
            number = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                for value in _values(table, group, column):
                    row = _row(value, number, column, f"{file.path}, row {number}", bad)
                    if row is not None:
                        yield row
                    number += 1
        except pyarrow.ArrowException as problem:
            bad(file.path, f"not readable as parquet{reached()}: {problem}")


def text_bytes(metadata: Any, group: int, column: str) -> int:
    """Size of a row group's column, unpacked; `metadata` is pyarrow's, and the column is one of its schema."""
    chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _values(table: Any, group: int, column: str) -> Iterator[Any]:
    """The column's values; in place of one that is no UTF-8, the exception that says so."""
    metadata = table.metadata
    row = text_bytes(metadata, group, column) // max(1, metadata.row_group(group).num_rows)
    n_rows = max(1, min(1024, _AT_ONCE // max(1, row)))
    for batch in table.iter_batches(batch_size=n_rows, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        try:
            yield from values.to_pylist()
        except UnicodeDecodeError:
            yield from (_one(value) for value in values)


def _one(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as problem:
        return problem


def _row(value: Any, number: int, column: str, place: str, bad: BadInput) -> Row | None:
    if isinstance(value, UnicodeDecodeError):
        bad(place, f"not UTF-8 (byte {value.start} of the text)")
        return None
    if not isinstance(value, str):
        bad(place, str(not_text(column, type(value))))
        return None
    return good_row(number, value, place, bad)
