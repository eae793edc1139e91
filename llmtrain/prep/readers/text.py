"""Text files: a document each."""

import codecs
from collections.abc import Iterator
from functools import partial

from llmtrain.errors import UserError
from llmtrain.prep.plan import InputFile
from llmtrain.prep.readers.bad_input import BadInput
from llmtrain.prep.readers.files import noting_damage, opened_unpacked
from llmtrain.prep.readers.row import Row

_CHUNK = 1 << 20


class NotUtf8(ValueError):
    """A file that is no UTF-8; the message says where."""


def text_rows(file: InputFile, bad: BadInput) -> Iterator[Row]:
    """The file as one row. A long one is read twice, in parts: it is given only if it is good to its end."""
    with noting_damage(file.path, bad):
        try:
            n_bytes, text = _examine(file)
        except NotUtf8 as problem:
            bad(*problem.args)
            return
        if n_bytes == 0:
            bad.found_empty(file.path)
        yield Row(0, partial(_again, file) if text is None else text, n_bytes, file.path)


def text_chunks(file: InputFile) -> Iterator[str]:
    """The text in parts of about a megabyte, without a byte order mark.

    Raises:
        NotUtf8: while reading.
        OSError, EOFError, UserError: see `opened_unpacked`.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = offset = 0
    with opened_unpacked(file) as content:
        while True:
            data = content.read(_CHUNK)
            waiting = decoder.getstate()[0]
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as problem:
                lines += data.count(b"\n", 0, max(0, problem.start - len(waiting)))
                byte = offset - len(waiting) + problem.start
                raise NotUtf8(f"{file.path}, line {lines + 1}", f"not UTF-8 (byte {byte})") from problem
            if not data:
                return
            lines += data.count(b"\n")
            offset += len(data)
            yield text


def _again(file: InputFile) -> Iterator[str]:
    try:
        yield from text_chunks(file)
    except (NotUtf8, OSError, EOFError) as problem:
        raise UserError(f"{file.path} was good when it was read first, and is not any more: {problem}") from problem


def _examine(file: InputFile) -> tuple[int, str | None]:
    """Length in bytes, and the text itself if it is short."""
    n_bytes = 0
    first: str | None = ""
    for number, chunk in enumerate(text_chunks(file)):
        n_bytes += len(chunk) if chunk.isascii() else len(chunk.encode())
        first = chunk if number == 0 else None
    return n_bytes, first
