"""Sources in pieces: together they are the source, whatever the size of a piece."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.prep import caps
from llmtrain.prep.config import SourceConfig
from llmtrain.prep.documents import whole
from llmtrain.prep.inputs import input_bytes, input_files, pieces_of
from llmtrain.prep.plan import Piece
from llmtrain.prep.readers import BadInput, lines, read_piece

HUGE = 1 << 40


def read(source: SourceConfig, partition_bytes: int, on_error="fail"):
    bad = BadInput(on_error)
    pieces = pieces_of(source, partition_bytes, on_error)
    return [document for piece in pieces for document in whole(read_piece(source, piece, bad))]


def jsonl(path: Path, texts, end="\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps({"text": text}) + end for text in texts).encode())
    return path


LINES = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40).map(lambda text: json.dumps({"n": 1, "text": text})),
    st.text("aé三🙂", max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
    st.sampled_from(["", "  ", "\t"]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n", "\r\n", "\n\n"])), min_size=1, max_size=12),
    final=st.booleans(),
    partition_bytes=st.integers(1, 300),
    block=st.integers(1, 64),
    long_line=st.sampled_from([1 << 22, 20]),
)
def test_byte_ranges_together_are_the_file(tmp_path, monkeypatch, rows, final, partition_bytes, block, long_line):
    data = "".join(line + end for line, end in rows)
    data = data if final else data.rstrip("\r\n") or "\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(data.encode())
    expected, offset = [], 0
    for line in data.encode().split(b"\n"):
        if line.strip():
            expected.append((json.loads(line)["text"], f"a.jsonl\0{offset}", f"{path}, byte {offset}"))
        offset += len(line) + 1
    source = SourceConfig(name="s", files=[str(path)])
    monkeypatch.setattr(lines, "_BLOCK", block)
    monkeypatch.setattr(lines, "LONG_LINE", long_line)
    found = read(source, partition_bytes)
    assert [(doc.text, doc.key, doc.place) for doc in found] == expected
    assert [doc.n_bytes for doc in found] == [len(text.encode()) for text, _, _ in expected]
    pieces = pieces_of(source, partition_bytes)
    assert sum(piece.size for piece in pieces) == path.stat().st_size
    assert all(piece.size <= partition_bytes for piece in pieces)


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("partition_bytes", [1, 700, HUGE])
def test_row_groups_together_are_the_file(tmp_path, kind, partition_bytes):
    texts = [f"{i} ä " * (i % 40) for i in range(500)]
    types = {
        "large_string": pyarrow.large_string(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }
    column = pyarrow.array(texts).cast(types.get(kind, pyarrow.string()))
    table = pyarrow.table({"meta": [{"a": i, "b": "x"} for i in range(500)], "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    source = SourceConfig(name="s", files=[str(tmp_path / "a.parquet")])
    found = read(source, partition_bytes)
    assert [doc.text for doc in found] == texts
    assert [doc.key for doc in found] == [f"a.parquet\0{i}" for i in range(500)]
    pieces = pieces_of(source, partition_bytes)
    assert len(pieces) == (17 if partition_bytes == 1 else 1) if partition_bytes != 700 else 1 < len(pieces) <= 17


def test_compressed_files_and_text_files_are_a_piece_each(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["x" * 50] * 10)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.txt").write_bytes(b"text\n" * 100)
    source = SourceConfig(name="s", files=[f"{tmp_path}/*"])
    pieces = pieces_of(source, 10)
    assert [(piece.files[0].name, piece.unit) for piece in pieces[-2:]] == [("b.jsonl.gz", "all"), ("c.txt", "all")]
    assert {piece.unit for piece in pieces[:-2]} == {"bytes"}
    assert input_bytes([source]) == sum(path.stat().st_size for path in tmp_path.iterdir())
    keys = [doc.key.partition("\0")[2] for doc in read(source, 10)]
    assert keys[:10] == keys[10:20] == [str(i * 63) for i in range(10)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.json.gz", "a.ndjson.zst"])
def test_names_of_files_of_lines(tmp_path, name):
    data = jsonl(tmp_path / "plain", ["one", "two"]).read_bytes()
    pack = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(data))
    assert [doc.text for doc in read(SourceConfig(name="s", files=[f"{tmp_path}/{name}"]), HUGE)] == ["one", "two"]


def test_a_shard_of_a_hub_dataset_is_a_piece(tmp_path):
    for i in range(3):
        jsonl(tmp_path / f"{i}.jsonl", [f"{i}.{row}" for row in range(4)])
    source = SourceConfig(name="s", hf_name="json", hf_kwargs={"data_files": f"{tmp_path}/*.jsonl"})
    assert [(piece.unit, piece.start, piece.stop) for piece in pieces_of(source, 1)] == [
        ("shard", i, 3) for i in range(3)
    ]
    every = read(source, 1)
    assert [doc.text for doc in every] == [f"{i}.{row}" for i in range(3) for row in range(4)]
    assert [doc.key for doc in every] == [f"json\0{i}/{row}" for i in range(3) for row in range(4)]
    capped = source.model_copy(update={"max_documents": 6})
    assert len(pieces_of(capped, 1)) == 1
    assert read(capped, 1) == every[:6]
    assert read(source.model_copy(update={"max_bytes": 3 * 5 + 2}), 1) == every[:5]
    one = pieces_of(source, 1)[0]
    jsonl(tmp_path / "3.jsonl", ["new"])
    again = source.model_copy(update={"hf_kwargs": {"data_files": [f"{tmp_path}/*.jsonl"]}})
    with pytest.raises(UserError, match="3 shards then, 4 now"):
        list(read_piece(again, one, BadInput("fail")))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("aé", max_size=12), min_size=1, max_size=20),
    partition_bytes=st.sampled_from([1, 40, 100, HUGE]),
    max_documents=st.none() | st.integers(1, 25),
    max_bytes=st.none() | st.integers(1, 150),
    fault=st.none() | st.integers(0, 20),
)
def test_caps_count_good_documents_in_order(tmp_path, texts, partition_bytes, max_documents, max_bytes, fault):
    path = jsonl(tmp_path / "a.jsonl", texts)
    if fault is not None:
        rows = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([*rows[:fault], b"{bad", *rows[fault:]]))
    source = SourceConfig(name="s", files=[str(path)])
    every = read(source, HUGE, "skip")
    assert [doc.text for doc in every] == texts
    expected, n_bytes = [], 0
    for doc in every:
        n_bytes += doc.n_bytes
        if len(expected) == max_documents or (max_bytes is not None and n_bytes > max_bytes):
            break
        expected.append(doc)
    capped = source.model_copy(update={"max_documents": max_documents, "max_bytes": max_bytes})
    assert read(capped, partition_bytes, "skip") == expected


@pytest.mark.parametrize("caps", [{"max_documents": 3}, {"max_bytes": 2_500_000}, {"max_bytes": 2_499_999}])
def test_caps_of_long_documents(tmp_path, caps):
    for i, n_words in enumerate([250_000, 10, 249_990, 500_000]):  # the fourth would come in parts
        (tmp_path / f"{i}.txt").write_text("word " * n_words)
    source = SourceConfig(name="s", files=[f"{tmp_path}/*.txt"])
    capped = source.model_copy(update=caps)
    expected = read(source, HUGE)[: 2 if caps == {"max_bytes": 2_499_999} else 3]
    assert read(capped, HUGE) == expected
    assert read(capped, HUGE, "skip") == expected


def test_caps_of_text_files_need_no_reading(tmp_path, monkeypatch):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes((b"\xef\xbb\xbf" if i == 1 else b"") + b"x" * 100)
    source = SourceConfig(name="s", files=[f"{tmp_path}/*.txt"], max_bytes=350)
    monkeypatch.setattr(caps, "read_piece", None)
    assert [piece.files[0].name for piece in pieces_of(source, 10)] == ["0.txt", "1.txt", "2.txt"]
    by_number = source.model_copy(update={"max_bytes": None, "max_documents": 4})
    assert [piece.files[0].name for piece in pieces_of(by_number, 10)] == ["0.txt", "1.txt", "2.txt", "3.txt"]


def test_a_cap_beyond_all_files_needs_no_reading(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", ["é" * 50] * 10)
    monkeypatch.setattr(caps, "read_piece", None)
    source = SourceConfig(name="s", files=[str(path)])
    capped = source.model_copy(update={"max_bytes": path.stat().st_size})
    assert pieces_of(capped, 100) == pieces_of(source, 100)


def test_caps_of_joined_documents(tmp_path):
    for name in ("a/1.txt", "a/2.txt", "b/1.txt", "c/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    source = SourceConfig(name="s", files=[f"{tmp_path}/*/*.txt"], join="folder")
    every = read(source, 1)
    assert [doc.key for doc in every] == ["a\0", "b\0", "c\0"]
    assert [doc.place for doc in every] == [str(tmp_path / name) for name in "abc"]
    assert read(source.model_copy(update={"max_documents": 2}), 1) == every[:2]
    assert read(source.model_copy(update={"max_bytes": every[0].n_bytes + 15}), 1) == every[:2]
    assert read(source.model_copy(update={"max_bytes": every[0].n_bytes + 14}), 1) == every[:1]


def test_the_plan_is_the_same_from_every_folder(tmp_path, monkeypatch):
    jsonl(tmp_path / "data/a.jsonl", ["one", "two"])
    monkeypatch.chdir(tmp_path)
    relative = SourceConfig(name="s", files=["data/*.jsonl", f"{tmp_path}/data/a.jsonl"])
    pieces = pieces_of(relative, 10)
    monkeypatch.chdir("/")
    bad = BadInput("fail")
    assert [doc.text for piece in pieces for doc in read_piece(relative, piece, bad)] == ["one", "two"]


def test_names_begin_at_the_first_wildcard_of_any_kind(tmp_path):
    jsonl(tmp_path / "x/part-1/a.jsonl", ["one"])
    jsonl(tmp_path / "x/part[1].jsonl", ["brackets"])
    names = [file.name for file in input_files(SourceConfig(name="s", files=[f"{tmp_path}/x/part-[0-9]/a.jsonl"]))]
    assert names == ["part-1/a.jsonl"]
    found = input_files(SourceConfig(name="s", files=[f"{tmp_path}/x/part[1].jsonl"]))
    assert [file.path for file in found] == [f"{tmp_path}/x/part[1].jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_has_changed_since_the_plan_is_refused_by_name(tmp_path, name, on_error):
    path = tmp_path / name
    jsonl(path, ["one"] * 20)
    source = SourceConfig(name="s", files=[str(path)])
    piece = pieces_of(source, 100)[-1]
    with path.open("ab") as file:
        file.write(b'{"text": "more"}\n')
    with pytest.raises(UserError, match=rf"{name} has changed since the work was planned: \d+ bytes then, \d+ now"):
        list(read_piece(source, piece, BadInput(on_error)))


def test_a_disk_that_fails_is_fatal_even_under_skip(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", ["one"])
    source = SourceConfig(name="s", files=[str(path)])
    (piece,) = pieces_of(source, HUGE)

    class Failing:
        def __enter__(self):
            raise OSError(5, os.strerror(5))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("llmtrain.prep.readers.files.open_input", lambda path: Failing())
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: .*Input/output error"):
        list(read_piece(source, piece, BadInput("skip")))


def test_only_what_is_read_is_imported(tmp_path):
    """jsonl needs neither pyarrow nor datasets; a plan of small parquet files does not open them."""
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).write_bytes(b'{"text": "x"}\n')
    code = (
        "import sys\n"
        "from llmtrain.prep.config import SourceConfig\n"
        "from llmtrain.prep.inputs import pieces_of\n"
        "from llmtrain.prep.readers import BadInput, read_piece\n"
        f"source = SourceConfig(name='s', files=['{tmp_path}/*'])\n"
        "first, second = pieces_of(source, 1 << 20)\n"
        "assert [doc.text for doc in read_piece(source, first, BadInput('fail'))] == ['x']\n"
        "print(sorted({'torch', 'streaming', 'composer', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pieces_of_remote_files_are_those_of_local_ones(s3, tmp_path, monkeypatch):
    lines_ = jsonl(tmp_path / "in/a.jsonl", [f"text {i} é" * 9 for i in range(300)]).read_bytes()
    (tmp_path / "in/a.jsonl").write_bytes(lines_ + b"{bad\n")
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(lines_))
    (tmp_path / "in/c.txt").write_text("word " * 500_000)
    table = pyarrow.table({"text": [f"row {i}" * 20 for i in range(300)]})
    pyarrow.parquet.write_table(table, tmp_path / "in/d.parquet", row_group_size=50)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for path in (tmp_path / "in").iterdir():
        client.upload_file(str(path), "bucket", f"in/{path.name}")
    found = {}
    for place in (str(tmp_path), "s3://bucket"):
        source = SourceConfig(name="s", files=[f"{place}/in/*"])
        bad = BadInput("skip")
        pieces = pieces_of(source, 5_000)
        documents = [document for piece in pieces for document in read_piece(source, piece, bad)]
        places = [doc.place.removeprefix(place) for doc in documents]
        named = [where.removeprefix(place) for where, _ in bad.first]
        found[place] = [doc._replace(place="") for doc in documents], places, named, len(pieces)
        capped = source.model_copy(update={"max_documents": 350})
        assert sum(piece.max_documents or 0 for piece in pieces_of(capped, 5_000, "skip")) == 50
    local, remote = found.values()
    assert remote == local
    assert local[2] == ["/in/a.jsonl, line 301"]


def test_a_piece_within_one_long_line_reads_no_further():
    """A file of one line of 10 GB would be read 160 times otherwise."""

    class Counting(io.BufferedReader):
        n_bytes = 0

        def read(self, size=-1):
            data = super().read(size)
            self.n_bytes += len(data)
            return data

        def read1(self, size=-1):
            data = super().read1(size)
            self.n_bytes += len(data)
            return data

    content = Counting(io.BytesIO(b"x" * 1_000_000 + b"\n{}\n"))
    assert list(lines.lines(content, Piece((), "bytes", 1000, 2000))) == []
    assert content.n_bytes <= 1000
    assert list(lines.lines(content, Piece((), "bytes", 999_990, 1_000_001))) == []
    assert list(lines.lines(content, Piece((), "bytes", 999_990, 1_000_002))) == [(1_000_001, b"{}")]
