"""Rows too long for `json.loads`, and long text files: the same text, in flat memory."""

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import whole
from llmtrain.prep.inputs import pieces_of
from llmtrain.prep.readers import BadInput, long_line, read_piece
from llmtrain.prep.readers.long_line import long_text
from llmtrain.prep.readers.row import BadRow

SURROGATES = st.integers(0xD800, 0xDFFF).map(chr)
STRINGS = st.text(st.one_of(st.characters(), st.sampled_from('"\\/{}[],: \t\r\ud83d\ude00'), SURROGATES), max_size=20)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(STRINGS, inner, max_size=3)),
    max_leaves=8,
)


def by_json(line: bytes, column: str = "text"):
    """What `json.loads` makes of a line: the text, or None."""
    try:
        value = json.loads(line.decode())
        text = value[column] if isinstance(value, dict) and column in value else None
        return text.encode().decode() if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def by_scan(line: bytes, cuts=(), column: str = "text"):
    borders = sorted({0, *(cut % (len(line) + 1) for cut in cuts), len(line)})
    try:
        found = long_text(iter([line[start:stop] for start, stop in pairwise(borders)]), column)
    except BadRow:
        return None
    if found is None:
        return None
    n_bytes, text = found
    text = text if isinstance(text, str) else "".join(text())
    assert n_bytes == len(text.encode())
    return text


@st.composite
def json_lines(draw):
    """Objects as JSON, with keys that come twice and any white space, escaped or not."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.one_of(st.sampled_from(["text", "text", "tex", "text2"]), STRINGS))
        ascii_only = draw(st.booleans())
        value = json.dumps(draw(st.one_of(STRINGS, VALUES)), ensure_ascii=ascii_only)
        parts.append(f"{json.dumps(key, ensure_ascii=ascii_only)}{draw(SPACE)}:{draw(SPACE)}{value}")
    return f"{draw(SPACE)}{{{f'{draw(SPACE)},'.join(parts)}}}{draw(SPACE)}".encode("utf-8", "surrogatepass")


SPACE = st.sampled_from(["", "", " ", "\t", " \r"])
CUTS = st.lists(st.integers(0, 400), max_size=12)


@settings(max_examples=200, deadline=None)
@given(json_lines(), CUTS)
@example(rb'{"text": "\ud83d\ude00"}', [13, 16, 17])
@example(rb'{"text": "\ud83d\ud83d\ude00"}', [16])
@example(rb'{"text": "\\ud83d\\ude00"}', [11, 17])
@example(rb'{"text": "\\\ud83d\ude00"}', [12, 18])
@example('{"text": "三🙂é"}'.encode(), range(30))
@example(b'{"text": "a", "text": 3}', [])
@example(b'{"text": 3, "text": "\xc3\xa9"}', [22])
@example(b'{"a": {"text": "no"}, "b": [{"text": "no"}]}', [])
@example(b'{"text": "a"} {"text": "b"}', [13])
@example(b'{"text": NaN, "text": "a"}', [11])
def test_scan_of_a_line_equals_json(line, cuts):
    assert by_scan(line, cuts) == by_json(line)


@settings(max_examples=250, deadline=None)
@given(json_lines(), st.data())
def test_damaged_lines_are_refused_where_json_refuses_them(line, data):
    edited = bytearray(line)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(edited)))
        new = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"}", b"]", b",", b":", b"\xff", b"\xe4", b"1", b"\\u12"])
        )
        edited[at : at + data.draw(st.integers(0, 2))] = new
    assert by_scan(bytes(edited), data.draw(CUTS)) == by_json(bytes(edited))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=12), CUTS)
def test_any_bytes_in_the_text(content, cuts):
    line = b'{"text": "' + content + b'"}'
    assert by_scan(line, cuts) == by_json(line)


def test_text_that_goes_through_a_file(monkeypatch):
    monkeypatch.setattr(long_line, "_IN_MEMORY", 100)
    text = "三 🙂\r\n" * 1000
    line = json.dumps({"text": "first " * 100, "n": 1, "text2": 2})[:-1] + ', "text": ' + json.dumps(text) + "}"
    assert by_scan(line.encode(), range(0, 12000, 7)) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a\x01"}', r"not JSON: Invalid control character \(byte 11 of the line\)"),
        (b'{"text": "' + b"a" * 99 + b"\xff", r"not UTF-8 \(byte 109 of the line, 0xff\)"),
        (rb'{"text": "ab\ud83d c"}', r"half a surrogate pair \(character 2\)"),
        (b'{"txt": "a", "n": 1}', r"no 'text'; it has txt, n \(set text_column\)"),
        (b'{"text": [1, 2]}', r"'text' should be text, found list"),
        (b'{"text": -1.5e3}', r"'text' should be text, found float"),
        (b'["a"]', r"expected an object with the key 'text'"),
        (b'{"text": "a"', r"not JSON: .*\(byte 12 of the line\)"),
        (b'{"text": "a"}}', r"not JSON: more behind the end of the value \(byte 13 of the line\)"),
        (b'{"n": ' + b"1" * 70_000 + b"}", r"not JSON: a number of too many digits"),
        (b'{"n": ' + b"[" * 1000, r"not JSON: nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_long_line(line, message):
    for size in (1 << 20, 7):
        with pytest.raises(BadRow, match=message):
            long_text((line[i : i + size] for i in range(0, len(line), size)), "text")


LONG_TEXT = "".join(f'Das ist Satz {i}: „größer“ 🙂 \\ "so"\n' for i in range(300_000))  # 11 MB


def documents(path: Path, **source):
    source = SourceConfig(name="s", files=[str(path)], **source)
    bad = BadInput("skip")
    return [doc for piece in pieces_of(source, 1 << 20) for doc in read_piece(source, piece, bad)], bad


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_long_rows_between_short_ones(tmp_path, pack, ascii_only):
    texts = ["short", LONG_TEXT, "", LONG_TEXT[::-1], "end"]
    rows = [json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only).encode() for text in texts]
    rows.insert(2, b'{"id": "' + b"x" * 5_000_000 + b'", "text": "other column is long"}')
    rows.insert(3, b'{"text": "' + b"y" * 5_000_000 + b'", "id": }')
    rows.insert(4, b" " * 5_000_000)
    suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join(rows)))
    found, bad = documents(path)
    joined = list(whole(found))
    texts.insert(2, "other column is long")
    assert [doc.text for doc in joined] == texts
    assert [doc.n_bytes for doc in joined] == [len(text.encode()) for text in texts]
    offsets = [sum(len(row) + 1 for row in rows[:i]) for i in (0, 1, 2, 5, 6, 7)]
    assert [doc.key for doc in joined] == [f"/{path.name}\0{offset}".removeprefix("/") for offset in offsets]
    assert max(len(doc.text) for doc in found) < 4_000_000
    parts = [doc.part for doc in found if doc.key == joined[1].key]
    assert parts == ["first", *["middle"] * (len(parts) - 2), "last"]
    assert len(parts) > 3
    assert bad.counts == 1
    assert bad.first[0][0] == f"{path}, line 4"


def test_long_text_file_and_joined_files(tmp_path):
    (tmp_path / "book").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "book" / name).write_bytes(b"\xef\xbb\xbf" + LONG_TEXT.encode())
    found, _ = documents(tmp_path / "book/a.txt")
    assert "".join(doc.text for doc in found) == LONG_TEXT
    assert sum(doc.n_bytes for doc in found) == len(LONG_TEXT.encode())
    assert len(found) > 3
    found, _ = documents(tmp_path / "**/*.txt", join="folder", header="# {path}")
    assert "".join(doc.text for doc in found) == f"# book/a.txt\n{LONG_TEXT}\n\n# book/b.txt\n{LONG_TEXT}"
    assert [doc.part for doc in found] == ["first", *["middle"] * (len(found) - 2), "last"]
    assert {doc.key for doc in found} == {"book\0"}


READ = """
import resource, sys
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.inputs import pieces_of
from llmtrain.prep.readers import BadInput, read_piece

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

warm, path = sys.argv[1:]
sizes = []
for files in ([warm], [path]):
    source = SourceConfig(name="s", files=files)
    n = 0
    for piece in pieces_of(source, 1 << 25):
        for document in read_piece(source, piece, BadInput("fail")):
            n += document.n_bytes
            del document
    assert n, files
    sizes.append(peak())
print(n, *sizes)
"""


def write_long(path: Path, n_bytes: int) -> None:
    """One document of that size; in parquet a row group of short ones."""
    kind = path.name.partition(".")[2]
    blocks = (
        "".join(LINE % i for i in range(start, start + 1000)) for start in range(10**7, 10**7 + n_bytes // 75, 1000)
    )
    if kind == "parquet":
        table = pyarrow.table({"text": [block[:3000] for block in blocks for _ in range(25)]})
        pyarrow.parquet.write_table(table, path, row_group_size=1 << 20, use_dictionary=False)
        return
    kinds = {".gz": partial(gzip.open, compresslevel=1), ".zst": zstandard.open}
    with kinds.get(path.suffix, open)(path, "wb") as file:
        if kind.startswith("jsonl"):
            file.write(b'{"id": 7, "text": "')
        for block in blocks:
            file.write(json.dumps(block).encode()[1:-1] if kind.startswith("jsonl") else block.encode())
        if kind.startswith("jsonl"):
            file.write(b'"}\n')


LINE = 'Ein langer Satz, der "wörtlich" immer wiederkehrt, bis auf Nummer %d.\n'  # 75 bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["txt", "jsonl", "parquet", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("txt.gz", "jsonl.zst"))],
)
def test_memory_does_not_grow_with_the_document(tmp_path, kind):
    sizes = {"small": 1 << 21, "large": 200_000_000}
    for name, size in sizes.items():
        write_long(tmp_path / f"{name}.{kind}", size)
    run = [sys.executable, "-c", READ, *(str(tmp_path / f"{name}.{kind}") for name in sizes)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    n_bytes, small, large = map(float, done.stdout.split())
    assert n_bytes >= 195_000_000
    assert large - small < 30, done.stdout
