import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmtrain.errors import UserError
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import whole
from llmtrain.prep.inputs import describe_inputs, files_of, pieces_of
from llmtrain.prep.readers import BadInput, read_piece

TEXTS = ["one", "", "zwei\nzweite Zeile", "三 🙂"]
JSONL = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def documents(**source):
    config = SourceConfig(name="s", **source)
    bad = BadInput("fail")
    return [document for piece in pieces_of(config, 1 << 20) for document in whole(read_piece(config, piece, bad))]


def texts(**source):
    return [document.text for document in documents(**source)]


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.json.zst", zstandard.ZstdCompressor().compress)],
)
def test_jsonl(tmp_path, name, pack):
    assert texts(files=[write(tmp_path / name, pack(JSONL + b"\n"))]) == TEXTS


def test_zstd_of_several_frames(tmp_path):
    frames = [zstandard.ZstdCompressor().compress(JSONL * 5000) for _ in range(3)]
    assert texts(files=[write(tmp_path / "a.jsonl.zst", b"".join(frames))]) == TEXTS * 15000


def test_parquet(tmp_path):
    table = pyarrow.table({"body": TEXTS, "n": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(files=[str(tmp_path / "a.parquet")], text_column="body") == TEXTS


def test_text_files_in_order_of_their_names(tmp_path):
    for name in ("b/2.txt", "a/9.py", "b/1.md", "b/c/d.txt"):
        write(tmp_path / name, f"I am {name}".encode())
    assert texts(files=[f"{tmp_path}/**/*"]) == ["I am a/9.py", "I am b/1.md", "I am b/2.txt", "I am b/c/d.txt"]
    assert texts(files=[f"{tmp_path}/**/*"], exclude=["*/b/*.txt"]) == ["I am a/9.py", "I am b/1.md"]


def test_shuffled_order_depends_on_the_relative_paths_alone(tmp_path):
    for root in ("x", "y/deeper"):
        for i in range(20):
            write(tmp_path / root / f"{i}.txt", f"{i}".encode())
    x, y = (texts(files=[f"{tmp_path}/{root}/*.txt"], order="shuffled") for root in ("x", "y/deeper"))
    assert x == y
    assert sorted(x, key=int) == [str(i) for i in range(20)] != x


def test_a_file_matched_twice_is_read_once(tmp_path):
    path = write(tmp_path / "a.txt", b"once")
    assert texts(files=[path, f"{tmp_path}/*.txt"]) == ["once"]


def test_hugging_face_dataset_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", JSONL)
    assert texts(hf_name="json", hf_kwargs={"data_files": path}) == TEXTS


def test_standard_library():
    found = files_of(SourceConfig(name="s", files=["{stdlib}/json/*.py"], exclude=["*/tool.py"]))
    assert {"__init__.py", "decoder.py"} <= {path.name for path in found}
    assert "tool.py" not in {path.name for path in found}
    topics = texts(files=["{stdlib}/pydoc_data/topics.py"], format="python_literals")
    assert len(topics) > 50
    assert any(text.startswith('The "assert" statement') for text in topics)


def test_limits(tmp_path):
    path = write(tmp_path / "a.jsonl", JSONL)
    assert texts(files=[path], max_documents=2) == TEXTS[:2]
    assert texts(files=[path], max_bytes=2) == []
    assert texts(files=[path], max_bytes=3) == TEXTS[:2]
    assert texts(files=[path], max_bytes=3 + 17) == TEXTS[:3]
    assert [d.n_bytes for d in documents(files=[path])] == [3, 0, 17, 8]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: expected an object"),
        ("a.jsonl", b'{"txt": "a"}\n', r"line 1: no 'text'; it has txt"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: 'text' should be text, found int"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' should be text, found NoneType"),
        ("a.jsonl", b'\n{"text": "\xff"}\n', r"line 2: not UTF-8 \(byte 10 of the line, 0xff\)"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"line 1: holds half a surrogate"),
        ("a.txt", b"good\nbad \xff\n", r"a\.txt, line 2: not UTF-8 \(byte 9\)"),
        ("a.txt.gz", gzip.compress(b"x" * 1000, mtime=0)[:-12], r"a\.txt\.gz: cannot be read: .*truncated"),
        ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst: cannot be read: .*damaged"),
        (
            "a.jsonl.zst",
            zstandard.ZstdCompressor().compress(JSONL * 99)[:-9],
            r"a\.jsonl\.zst: cannot be read: .*truncated",
        ),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not readable as parquet"),
        ("a.txt", b"", None),
    ],
)
def test_malformed_input_is_named_with_file_and_line(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    if message is None:
        assert texts(files=[path]) == [""]
    else:
        with pytest.raises(UserError, match=message):
            texts(files=[path])


def test_parquet_without_the_column_or_with_nulls(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no 'body'; it has text"):
        texts(files=[str(tmp_path / "a.parquet")], text_column="body")
    with pytest.raises(UserError, match=r"row 1: 'text' should be text, found NoneType"):
        texts(files=[str(tmp_path / "a.parquet")])


def test_nothing_matches(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        texts(files=[f"{tmp_path}/*.txt"])
    write(tmp_path / "a.txt", b"")
    with pytest.raises(UserError, match="exclude leaves none"):
        texts(files=[f"{tmp_path}/*.txt"], exclude=["*.txt"])


def test_unknown_hugging_face_dataset():
    with pytest.raises(UserError, match="cannot be opened"):
        texts(hf_name="./no/such/folder")


def test_inputs_change_with_the_files(tmp_path):
    path = write(tmp_path / "a.txt", b"abc")
    source = SourceConfig(name="s", files=[f"{tmp_path}/*"])
    before = describe_inputs(source)
    assert describe_inputs(source) == before
    Path(path).write_bytes(b"abcd")
    assert describe_inputs(source) != before


def test_files_of_a_folder_become_one_document(tmp_path):
    for name in ("mail/b.py", "mail/a.py", "mail/sub/c.py", "one.py", "x/y.py"):
        write(tmp_path / name, f"I am {name}\n".encode())
    joined = {"files": [f"{tmp_path}/**/*.py"], "join": "folder", "header": "# {path}"}
    mail = "\n\n".join(f"# mail/{name}\nI am mail/{name}\n" for name in ("a.py", "b.py", "sub/c.py"))
    assert texts(**joined) == [mail, "# one.py\nI am one.py\n", "# x/y.py\nI am x/y.py\n"]
    assert sorted(texts(**joined, order="shuffled")) == sorted(texts(**joined))
    assert texts(**joined, max_documents=1) == [mail]


def test_rows_of_a_file_become_one_document(tmp_path):
    files = [write(tmp_path / name, JSONL) for name in ("a.jsonl", "b.jsonl")]
    assert texts(files=files, join="file") == ["\n\n".join(TEXTS)] * 2
