"""Parquet files: a document a row."""

from collections.abc import Iterator
from typing import Any

from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage, opened
from llmtrain.prep.readers.row import Row, good_row, no_column, not_text

_BATCH = 64  # rows; more make reading no faster, and long documents come in dozens


def parquet_rows(file: InputFile, piece: Piece, column: str, bad: BadInput) -> Iterator[Row]:
    """The rows of the piece's row groups.

    Memory: pyarrow unpacks a page at a time, and gives rows in batches: a page (usually about 1 MB, but at least one
    row) and a few rows are held at once, so a row of 200 MB costs several times that.
    """
    import pyarrow
    import pyarrow.parquet

    with noting_damage(file.path, bad), opened(file) as data:
        try:
            table = pyarrow.parquet.ParquetFile(data, pre_buffer=False)
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
            for batch in table.iter_batches(batch_size=_BATCH, row_groups=list(groups), columns=[column]):
                values = batch.column(0)
                for index in range(len(values)):
                    row = _row(values[index], number, column, f"{file.path}, row {number}", bad)
                    if row is not None:
                        yield row
                    number += 1
        except pyarrow.ArrowException as problem:
            bad(file.path, f"not readable as parquet: {problem}")


def _row(value: Any, number: int, column: str, place: str, bad: BadInput) -> Row | None:
    try:
        text = value.as_py()
    except UnicodeDecodeError as problem:
        bad(place, f"not UTF-8 (byte {problem.start} of the text)")
        return None
    if not isinstance(text, str):
        bad(place, str(not_text(column, type(text))))
        return None
    return good_row(number, text, place, bad)
