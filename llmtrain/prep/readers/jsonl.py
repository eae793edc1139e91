"""Files of JSON objects, one a line: a document a line."""

import json
from collections.abc import Iterator
from typing import IO, Any

from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage, opened, opened_unpacked
from llmtrain.prep.readers.row import Row, utf8_length

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_parse = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # `json.loads` without its four layers of Python


def jsonl_rows(file: InputFile, piece: Piece, column: str, bad: BadInput) -> Iterator[Row]:
    """The rows that begin within the piece's bytes; blank lines are passed over."""
    with noting_damage(file.path, bad):
        lines_before = _LinesBefore(file, piece)
        with opened_unpacked(file) as content:
            if file.size == 0:
                bad(file.path, "is empty: a file of rows has at least one")
                return
            for number, (offset, line) in enumerate(_lines(content, piece)):
                try:
                    row = _parse_row(line)
                    if row is None:
                        continue
                    text = _text_of(row, column)
                    n_bytes = utf8_length(text)
                except UnicodeEncodeError as problem:
                    bad(lines_before.place(number), f"holds half a surrogate pair (character {problem.start})")
                    continue
                except UnicodeDecodeError as problem:
                    where = f"byte {problem.start} of the line, 0x{line[problem.start]:02x}"
                    bad(lines_before.place(number), f"not UTF-8 ({where})")
                    continue
                except RecursionError:
                    bad(lines_before.place(number), "not JSON that can be read: nested too deeply")
                    continue
                except ValueError as problem:
                    bad(lines_before.place(number), str(problem))
                    continue
                place = f"{file.path}, byte {offset}"
                if not text:
                    bad.found_empty(place)
                yield Row(offset, text, n_bytes, place)


class _LinesBefore:
    """Line numbers for messages where a piece begins in the middle of a file: counted when the first is asked for."""

    def __init__(self, file: InputFile, piece: Piece) -> None:
        self._file = file
        self._stop = piece.start if piece.unit == "bytes" else 0
        self._count: int | None = None

    def place(self, number: int) -> str:
        """Name of the piece's line `number`, counted from 0."""
        if self._count is None:
            self._count = self._lines()
        return f"{self._file.path}, line {self._count + number + 1}"

    def _lines(self) -> int:
        if not self._stop:
            return 0
        count, left, last = 0, self._stop, b"\n"
        with opened(self._file) as data:
            while left and (block := data.read(min(left, _BLOCK))):
                count += block.count(b"\n")
                left -= len(block)
                last = block[-1:]
        return count + (last != b"\n")  # the line that the piece begins in is the one before its first


def _lines(content: IO[bytes], piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within the piece's bytes, without their ends, each with its offset."""
    offset, stop = 0, None
    if piece.unit == "bytes":
        offset, stop = piece.start, piece.stop
        if offset:
            content.seek(offset - 1)  # a line begins here if the byte before is the end of another
            skipped = _to_next_line(content)
            if skipped is None:
                return
            offset += skipped - 1
            content.seek(offset)
    tail: list[bytes] = []
    while stop is None or offset < stop:
        block = content.read(_BLOCK)
        if not block:
            break
        lines = block.split(b"\n")
        if len(lines) > 1:
            tail.append(lines[0])
            lines[0] = b"".join(tail)
            tail = []
        tail.append(lines.pop())
        for line in lines:
            yield offset, line
            offset += len(line) + 1
            if stop is not None and offset >= stop:
                return
    last = b"".join(tail)
    if last:
        yield offset, last


def _to_next_line(content: IO[bytes]) -> int | None:
    """How many bytes on the next line begins; None at the end of the file."""
    read = 0
    while block := content.read(_BLOCK):
        end = block.find(b"\n")
        if end >= 0:
            return read + end + 1
        read += len(block)
    return None


def _parse_row(line: bytes) -> Any:
    """The value of a line; None for a blank one.

    Raises:
        UnicodeDecodeError, RecursionError, ValueError: it is no JSON in UTF-8.
    """
    text = line.decode()
    try:
        value, end = _parse(text, 0)
        if end == len(text):
            return value
    except (StopIteration, ValueError):
        pass
    # White space around it, a byte order mark, or a mistake: the slow way, with its message.
    stripped = line.removeprefix(_BOM).strip()
    if not stripped:
        return None
    try:
        return json.loads(stripped.decode())
    except ValueError as problem:
        raise ValueError(f"not JSON: {problem}") from None


def _text_of(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the key {column!r}, found {type(row).__name__}")
    if column not in row:
        raise ValueError(f"no {column!r}; it has {', '.join(row) or 'nothing'} (set text_column)")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{column!r} should be text, found {type(text).__name__}")
    return text
