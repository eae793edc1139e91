import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmtrain.conversations.formats import parse
from llmtrain.conversations.messages import PromptResponse
from llmtrain.conversations.rows import file_rows, identity_of_files
from llmtrain.errors import UserError

ROWS = [
    {"prompt": "one", "response": "1"},
    {"prompt": "zwei\n", "response": "ü 🙂"},
    {"prompt": "三", "response": "a,b"},
]
EXAMPLES = [PromptResponse(**row) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def csv_bytes(ending="\n"):
    cells = [["prompt", "response"], *([row["prompt"], row["response"]] for row in ROWS)]
    return "".join(",".join(f'"{cell}"' for cell in line) + ending for line in cells).encode()


def examples(*paths):
    rows = list(file_rows(paths))
    assert not [row.problem for row in rows if row.problem]
    return [parse(row.data) for row in rows]


def told(path):
    """place -> reason of the bad rows, and the examples of the good ones."""
    rows = list(file_rows([path]))
    assert all((row.data is None) != (row.problem is None) for row in rows)
    bad = {row.place.removeprefix(str(path)): row.problem.reason for row in rows if row.problem}
    return bad, [parse(row.data) for row in rows if row.data is not None]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", LINES.rstrip()),
        ("a.json", LINES),
        ("a.json", b"\n " + json.dumps(ROWS, indent=1).encode()),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode()),
        ("a.csv", csv_bytes()),
        ("a.csv", b"\xef\xbb\xbf" + csv_bytes("\r\n")),
    ],
)
def test_text_files(tmp_path, name, data, packed):
    assert examples(write(tmp_path / (name + packed), PACKED[packed](data))) == EXAMPLES


def test_parquet(tmp_path):
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 600
    table = pyarrow.table({"messages": chats, "id": list(range(600))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    rows = list(file_rows([tmp_path / "a.parquet"]))
    assert [row.data["id"] for row in rows] == [row.number for row in rows] == list(range(600))
    assert rows[599].place.endswith("a.parquet, row 599")
    assert parse(rows[599].data).messages[1].content == "b"


def test_parquet_with_bytes_that_are_no_utf8(tmp_path):
    words = pyarrow.array([b"one", b"tw\xff", b"three"])
    broken = pyarrow.StringArray.from_buffers(3, *words.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken, "response": ["1", "2", "3"]}), tmp_path / "a.parquet")
    bad, good = told(tmp_path / "a.parquet")
    assert bad == {", row 1": "invalid UTF-8"}
    assert [example.prompt for example in good] == ["one", "three"]


def test_bad_lines_are_told_and_the_others_read(tmp_path):
    lines = [
        b'{"prompt": "one", "response": "1"}',
        b'{"prompt": "two", "resp',
        b'{"prompt": "t\xffo", "response": "2"}',
        b"[1, 2]",
        b'"text"',
        b"",
        b"[" * 100_000,
        b'{"prompt": "six", "response": "6"}',
        b'{"prompt": "tru',
    ]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    bad, good = told(path)
    assert bad == {
        ", line 2": "broken JSON",
        ", line 3": "invalid UTF-8",
        ", line 4": "not an object",
        ", line 5": "not an object",
        ", line 7": "broken JSON",
        ", line 9": "broken JSON",
    }
    assert good == [PromptResponse("one", "1"), PromptResponse("six", "6")]


def test_bad_elements_of_an_array(tmp_path):
    bad, good = told(write(tmp_path / "a.json", b'[{"prompt": "a", "response": "b"}, 3, null]'))
    assert bad == {", row 1": "not an object", ", row 2": "not an object"}
    assert len(good) == 1


def test_bad_rows_of_csv(tmp_path):
    data = b'prompt,response\none,1\ntwo\nthr\xffee,3\n\n"fo\nur",4\nfive,5,6\n'
    bad, good = told(write(tmp_path / "a.csv", data))
    assert bad == {
        ", row 1 (line 3)": "wrong number of columns",
        ", row 2 (line 4)": "invalid UTF-8",
        ", row 4 (line 8)": "wrong number of columns",
    }
    assert good == [PromptResponse("one", "1"), PromptResponse("fo\nur", "4")]


def test_a_csv_cell_may_be_long_and_hold_a_chat(tmp_path):
    chat = [{"role": "user", "content": "x" * 300_000}, {"role": "assistant", "content": 'say "hi"'}]
    cell = json.dumps(chat).replace('"', '""')
    (made,) = examples(write(tmp_path / "a.csv", f'id,messages\n1,"{cell}"\n'.encode()))
    assert made.messages[1].content == 'say "hi"'


def test_globs_in_order_and_each_file_once(tmp_path):
    for name in ("b/2", "a/9", "b/1"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name, "response": "x"}).encode())
    names = [example.prompt for example in examples(f"{tmp_path}/b/1.jsonl", f"{tmp_path}/**/*.jsonl")]
    assert names == ["b/1", "a/9", "b/2"]
    write(tmp_path / "c[1].jsonl", LINES)
    assert examples(tmp_path / "c[1].jsonl") == EXAMPLES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"x", r"a\.txt is none of \.jsonl"),
        ("a.json", b'[{"prompt": "x"}, {"pro', "an object a line"),
        ("a.json", b'[\n{"prompt": "\xff"}]', "line 2: not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "names a column twice"),
        ("a.csv", b'a,b\n1,"2\n', r"line 2: not CSV"),
        ("a.parquet", b"PAR1 no", "not readable as parquet"),
        ("a.jsonl.gz", gzip.compress(LINES * 50, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES * 50)[:-5], "truncated"),
        ("a.jsonl.gz", LINES, "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_on(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        list(file_rows([path]))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        list(file_rows([tmp_path / "*.jsonl"]))
    with pytest.raises(UserError, match=r"It is a folder: write .*/\*\.jsonl"):
        list(file_rows([tmp_path]))


def test_identity_follows_names_and_contents_not_the_folder(tmp_path):
    first = identity_of_files([write(tmp_path / "x/a.jsonl", LINES)])
    assert first == identity_of_files([write(tmp_path / "y/a.jsonl", LINES)])
    assert first != identity_of_files([write(tmp_path / "x/b.jsonl", LINES)])
    assert first != identity_of_files([write(tmp_path / "x/a.jsonl", LINES.replace(b"1", b"2"))])
    both = [write(tmp_path / "z/a.jsonl", b"{}"), write(tmp_path / "z/b.jsonl", b"{}")]
    assert identity_of_files(both) != identity_of_files(both[::-1])
