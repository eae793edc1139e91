"""JSON objects on lines too long for `json.loads`, whose memory is several times the line: only the text is kept."""

import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]

from llmtrain.errors import UserError
from llmtrain.prep.readers.row import BadRow, half_surrogate, no_column, not_text

_CHUNK = 1 << 20
_IN_MEMORY = 1 << 22  # bytes of text that need no file
_DEEPEST = 900  # `json.loads` gives up near 1,000
_LONGEST_NUMBER = 1 << 16
_BOM = b"\xef\xbb\xbf"

_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'[^ \t\r\n,:"\[\]{}]*+')
_STRING = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_CLOSING = {b"{": b"}", b"[": b"]"}


def long_text(chunks: Iterator[bytes], column: str) -> tuple[int, str | Callable[[], Iterator[str]]] | None:
    """The text of a line: its length in UTF-8, and itself, or what gives a long one in parts, once. None: it is blank.

    The same as `json.loads(line)[column]`, in flat memory: a long text goes through a temporary file, because only the
    line's end shows whether it is JSON at all, and whether the key does not come a second time. It differs where
    objects are nested more than 900 deep, and in numbers of more than 65,536 digits, which are refused.

    Args:
        chunks: the line's bytes; they are read to their end only if it is good.
        column: the key.

    Raises:
        BadRow: it is no JSON object with that text.
        UserError: there is no room for temporary files.
    """
    text = _Text()
    return text.finish() if _Line(chunks, column, text).read() else None


class _Text:
    """The text, on its way to memory or a file."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  (closed by `finish`, or by who reads it)
        self._n_characters = 0
        self._half: int | None = None

    def begin(self) -> None:
        """Forget what was written: the key has come again."""
        self._file.close()
        self._begin()

    def write(self, text: str) -> None:
        try:
            data = text.encode()
        except UnicodeEncodeError as problem:
            self._half = self._n_characters + problem.start if self._half is None else self._half
            return
        self._n_characters += len(text)
        try:
            self._file.write(data)
        except OSError as problem:
            raise UserError(
                f"a text of more than {self._file.tell():,} bytes finds no room in {tempfile.gettempdir()}: {problem}. "
                "Set TMPDIR to a folder with more"
            ) from problem

    def finish(self) -> tuple[int, str | Callable[[], Iterator[str]]]:
        if self._half is not None:
            raise half_surrogate(self._half)
        n_bytes = self._file.tell()
        self._file.seek(0)
        if n_bytes > _IN_MEMORY:
            return n_bytes, self._chunks
        with self._file:
            return n_bytes, self._file.read().decode()

    def _chunks(self) -> Iterator[str]:
        with self._file, io.TextIOWrapper(self._file, "utf-8", newline="") as file:
            while text := file.read(_CHUNK):
                yield text


class _Line:
    """A JSON value, read token by token."""

    def __init__(self, chunks: Iterator[bytes], column: str, text: _Text) -> None:
        self._chunks = chunks
        self._column = column
        self._text = text
        self._keys: list[str] = []  # of the object itself, for messages
        self._found: type | None = None  # of the column's value
        self._data = b""
        self._at = 0
        self._before = 0  # bytes of the line before `_data`
        self._wanted = False  # the object's last key is the column
        self._more()
        if self._data.startswith(_BOM):
            self._at = len(_BOM)

    def read(self) -> bool:
        """Read to the end; False for a blank line."""
        if not self._peek():
            return False
        open_ = bytearray()  # the brackets that are open
        expected = "value"
        while True:
            byte = self._peek()
            if expected == "value":
                expected = self._value(byte, open_)
            elif expected == "key":
                self._key(byte, outermost=len(open_) == 1)
                expected = "value"
            elif not open_:
                if byte:
                    raise self._not_json("more behind the end of the value")
                break
            elif byte == b",":
                self._at += 1
                expected = "key" if open_[-1:] == b"{" else "value"
            elif byte == _CLOSING[bytes(open_[-1:])]:
                self._at += 1
                open_.pop()
            else:
                raise self._not_json("expected ',' or a closing bracket")
        if self._found is None:
            raise no_column(self._column, self._keys)
        if self._found is not str:
            raise not_text(self._column, self._found)
        return True

    def _value(self, byte: bytes, open_: bytearray) -> str:
        """Read a value, or the bracket that it begins with; what is expected then."""
        if not open_ and byte not in {b"{", b""}:
            raise BadRow(f"expected an object with the key {self._column!r}, found something that begins with {byte!r}")
        wanted = len(open_) == 1 and self._wanted
        if byte in _CLOSING:
            self._at += 1
            if wanted:
                self._found = dict if byte == b"{" else list
            if self._peek() == _CLOSING[byte]:
                self._at += 1
                return "end"
            open_ += byte
            if len(open_) > _DEEPEST:
                raise self._not_json("nested too deeply")
            return "key" if byte == b"{" else "value"
        if byte == b'"':
            if wanted:
                self._found = str
                self._text.begin()
            self._string(self._text.write if wanted else _ignore)
        else:
            found = self._scalar()
            self._found = found if wanted else self._found
        return "end"

    def _key(self, byte: bytes, *, outermost: bool) -> None:
        if byte != b'"':
            raise self._not_json("expected a key in quotes")
        parts: list[str] = []
        longest = len(self._column)
        self._string(lambda text: parts.append(text) if sum(map(len, parts)) <= longest else None)
        if self._peek() != b":":
            raise self._not_json("expected ':' behind a key")
        self._at += 1
        if outermost:
            key = "".join(parts)
            self._wanted = key == self._column
            if len(self._keys) < 20 and key not in self._keys:
                self._keys.append(key[:80])

    def _scalar(self) -> type:
        """A number or a name."""
        while (end := _SCALAR.match(self._data, self._at).end()) == len(self._data):  # type: ignore[union-attr]
            if end - self._at > _LONGEST_NUMBER or not self._more():
                break
        if end - self._at > _LONGEST_NUMBER:
            raise self._not_json("a number of too many digits")
        token = self._data[self._at : end]
        try:
            value = json.loads(token.decode())
        except ValueError as problem:
            raise self._not_json(str(problem)) from None
        self._at = end
        return type(value)

    def _string(self, write: Callable[[str], None]) -> None:
        """Read a string, whose quote is next, in parts of about a chunk."""
        self._at += 1
        carried = ""  # the first half of a surrogate pair, whose second may follow in the next chunk
        while True:
            end = _STRING.match(self._data, self._at).end()  # type: ignore[union-attr]
            closed = self._data[end : end + 1] == b'"'
            if not closed and len(self._data) - end >= 6:
                raise self._not_json("an escape that is none", end)
            if not closed:
                end -= _incomplete(self._data[max(self._at, end - 3) : end])
            text = carried + self._decoded(self._data[self._at : end])
            if carried:
                text = _PAIR.sub(_whole, text, count=1)
            carried = text[-1:] if not closed and "\ud800" <= text[-1:] <= "\udbff" else ""
            write(text[: len(text) - len(carried)])
            self._at = end
            if closed:
                self._at += 1
                return
            if not self._more():
                raise self._not_json("a string without end")

    def _decoded(self, piece: bytes) -> str:
        try:
            text: str = scanstring(f'"{piece.decode()}"', 1)[0]
        except UnicodeDecodeError as problem:
            byte = self._before + self._at + problem.start
            raise BadRow(f"not UTF-8 (byte {byte} of the line, 0x{piece[problem.start]:02x})") from None
        except json.JSONDecodeError as problem:
            where = self._at + len(piece.decode()[: problem.pos - 1].encode())
            raise self._not_json(problem.msg.removesuffix(" at"), where) from None
        return text

    def _peek(self) -> bytes:
        """The next byte that is no white space; nothing at the end."""
        while (at := _SPACE.match(self._data, self._at).end()) == len(self._data):  # type: ignore[union-attr]
            self._at = at
            if not self._more():
                return b""
        self._at = at
        return self._data[at : at + 1]

    def _more(self) -> bool:
        """Read a chunk, and drop what was used up."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._data, self._before, self._at = self._data[self._at :] + chunk, self._before + self._at, 0
        return True

    def _not_json(self, reason: str, at: int | None = None) -> BadRow:
        return BadRow(f"not JSON: {reason} (byte {self._before + (self._at if at is None else at)} of the line)")


def _ignore(text: str) -> None:
    """For strings that are read only to see whether they are good."""


def _incomplete(end: bytes) -> int:
    """How many of these last bytes (up to 3) begin a character of UTF-8 that goes on behind them."""
    for n in range(1, len(end) + 1):
        byte = end[-n]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF5 else 0
            return n if length > n else 0
        if byte < 0x80:
            return 0
    return 0


def _whole(pair: re.Match[str]) -> str:
    """Two halves as the character that they stand for."""
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")
