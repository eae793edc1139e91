"""Files of JSON objects, one a line: a document a line."""

import json
from collections.abc import Iterator
from typing import Any

from llmtrain.json_text import parse_json
from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage, opened_unpacked
from llmtrain.prep.readers.lines import LongLine, lines, lines_before
from llmtrain.prep.readers.long_line import long_text
from llmtrain.prep.readers.row import BadRow, Row, text_of, utf8_length

_BLANK = object()
_COUNTED = 1 << 28  # bytes; with bad rows in every piece of a large file, counting would read it again for each piece
_SPACE = " \t\r\n"  # what JSON takes for white space
_parse = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # `json.loads` without its layers of Python


def jsonl_rows(file: InputFile, piece: Piece, column: str, bad: BadInput) -> Iterator[Row]:
    """The rows that begin within the piece's bytes; blank lines are passed over."""
    before: int | None = None  # lines before the piece: counted when the first message asks for it
    number = -1

    def reached() -> str:
        return f" behind line {number + 1}" if number >= 0 else ""

    with noting_damage(file.path, bad, reached), opened_unpacked(file) as content:
        if file.size == 0:
            bad(file.path, "is empty: a file of rows has at least one")
            return
        for number, (offset, line) in enumerate(lines(content, piece)):
            try:
                row = _long_row(line, column) if isinstance(line, LongLine) else _short_row(line, column)
            except BadRow as problem:
                if bad.on_error == "skip" and piece.start > _COUNTED:
                    bad(f"{file.path}, byte {offset}", str(problem))
                    continue
                before = lines_before(file, piece) if before is None else before
                bad(f"{file.path}, line {before + number + 1}", str(problem))
                continue
            if row is not None:
                n_bytes, text = row
                place = f"{file.path}, byte {offset}"
                if not n_bytes:
                    bad.found_empty(place)
                yield Row(offset, text, n_bytes, place)
        if number < 0 and piece.unit == "all":
            bad.found_empty(file.path)


def _short_row(line: bytes, column: str) -> tuple[int, str] | None:
    value = _value(line)
    if value is _BLANK:
        return None
    if not isinstance(value, dict):
        hint = "; `jq -c '.[]'` makes jsonl of an array" if isinstance(value, list) else ""
        raise BadRow(f"expected an object with the key {column!r}, found {type(value).__name__}{hint}")
    text = text_of(value, column)
    return utf8_length(text), text


def _long_row(line: LongLine, column: str) -> Any:
    return long_text(iter(line), column)


def _value(line: bytes) -> Any:
    """The value of a line, `_BLANK` for a blank one."""
    try:
        text = line.decode()
    except UnicodeDecodeError as problem:
        raise BadRow(f"not UTF-8 (byte {problem.start} of the line, 0x{line[problem.start]:02x})") from None
    try:
        value, end = _parse(text, 0)
        if end == len(text) or not text[end:].strip(_SPACE):
            return value
    except (StopIteration, ValueError, RecursionError):
        pass
    # White space before it, a byte order mark, or a mistake: the slow way, with its message.
    stripped = text.removeprefix("\ufeff").strip(_SPACE)
    if not stripped:
        return _BLANK
    try:
        return parse_json(stripped)
    except RecursionError:
        raise BadRow("not JSON: nested too deeply") from None
    except ValueError as problem:
        raise BadRow(f"not JSON: {problem}") from None
