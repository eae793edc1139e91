"""Lines of a file, or of a range of its bytes."""

import io
import sys
from collections.abc import Iterator

from llmtrain.prep.plan import InputFile, Piece
from llmtrain.prep.readers.files import opened

_BLOCK = 1 << 20
LONG_LINE = 1 << 22
"""Bytes; a longer line comes in chunks."""


class LongLine:
    """A line in chunks, to be read before the next line is asked for; what is not read is passed over then."""

    def __init__(self, content: io.BufferedReader, begin: list[bytes]) -> None:
        self._content = content
        self._begin = begin
        self.n_bytes = sum(map(len, begin))
        """Bytes that were read."""
        self.rest = b""
        """What was read behind the line's end, which is a byte long."""
        self.ended = False
        """Whether the line has an end, which the last one of a file need not have."""
        self._chunks = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def _read(self) -> Iterator[bytes]:
        while self._begin:
            yield self._begin.pop(0)
        while not self.ended and (block := self._content.read1(_BLOCK)):
            chunk, end, self.rest = block.partition(b"\n")
            self.ended = bool(end)
            self.n_bytes += len(chunk)
            yield chunk


def lines(content: io.BufferedReader, piece: Piece) -> Iterator[tuple[int, bytes | LongLine]]:
    r"""The lines (`\n`) that begin within the piece's bytes, without their ends, each with its offset in the file."""
    offset, stop = 0, None
    if piece.unit == "bytes":
        stop = piece.stop
        if piece.start:
            content.seek(piece.start - 1)  # a line begins at `start` if the byte before is the end of another
            skipped = _to_next_line(content, sys.maxsize if stop is None else stop - piece.start)
            if skipped is None:  # all of the piece is within one line
                return
            offset = piece.start - 1 + skipped
            content.seek(offset)
    waiting: list[bytes] = []  # the beginning of a line
    n_waiting = 0
    rest = b""  # of a block, behind a long line
    while stop is None or offset < stop:
        block, rest = rest or content.read1(_BLOCK), b""  # `read` would lose what stands before the break of an archive
        found = block.split(b"\n")
        if len(found) > 1:
            found[0] = b"".join([*waiting, found[0]])
            waiting, n_waiting = [], 0
        waiting.append(found.pop())
        n_waiting += len(waiting[-1])
        for line in found:
            yield offset, line
            offset += len(line) + 1
            if stop is not None and offset >= stop:
                return
        if not block:
            break
        if n_waiting > LONG_LINE:
            long = LongLine(content, waiting)
            yield offset, long
            for _ in long:
                pass
            offset += long.n_bytes + long.ended
            waiting, n_waiting, rest = [], 0, long.rest
    if waiting and (last := b"".join(waiting)):
        yield offset, last


def lines_before(file: InputFile, piece: Piece) -> int:
    """How many lines begin before the first one of the piece. Reads everything before the piece.

    Raises:
        OSError, UserError: see `opened`.
    """
    if piece.unit != "bytes" or not piece.start:
        return 0
    left, count, last = piece.start, 0, b"\n"
    with opened(file) as content:
        while left and (block := content.read(min(left, _BLOCK))):
            count += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return count + (last != b"\n")  # the line that goes on into the piece belongs to the one before


def _to_next_line(content: io.BufferedReader, most: int) -> int | None:
    """How many bytes on the next line begins; None if there is no end of a line among so many bytes."""
    read = 0
    while block := content.read(min(_BLOCK, most - read)):
        end = block.find(b"\n")
        if end >= 0:
            return read + end + 1
        read += len(block)
    return None
