"""What cannot be read: named, and then fatal or counted; never a corpus that is short in silence."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.prep.config import PrepRecipe, SourceConfig
from llmtrain.prep.documents import whole
from llmtrain.prep.inputs import pieces_of
from llmtrain.prep.readers import BadInput, jsonl, read_piece
from llmtrain.prep.run import run

HUGE = 1 << 40


def row(text) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def binary_as_string(*texts: bytes) -> bytes:
    """A parquet file whose column says that it is text, and is not."""
    array = pyarrow.array(texts, pyarrow.binary())
    return parquet(text=pyarrow.StringArray.from_buffers(len(array), *array.buffers()[1:]))


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def read(path: Path, on_error: str, partition_bytes: int = HUGE, **source):
    config = SourceConfig(name="s", files=[str(path)], **source)
    bad = BadInput(on_error)
    pieces = pieces_of(config, partition_bytes, on_error)
    return [document.text for piece in pieces for document in whole(read_piece(config, piece, bad))], bad


GOOD = row("good")
ZSTD = zstandard.ZstdCompressor().compress
SURROGATE = rb'{"text": "ab\ud83d"}' + b"\n"
# name of the file, what it holds, place and reason as they are named, texts that are read under `skip`
CASES = [
    ("a.jsonl", GOOD + b'{"text": "cut\n' + GOOD, r", line 2", r"not JSON: .*", ["good", "good"]),
    ("a.jsonl", GOOD + b'{"text": "a"} x\n' + GOOD, r", line 2", r"not JSON: Extra data.*", ["good", "good"]),
    (
        "a.jsonl",
        b"\n" + GOOD + b'["text"]\n',
        r", line 3",
        r"expected an object with the key 'text', found list; `jq -c '\.\[\]'` makes jsonl of an array",
        ["good"],
    ),
    ("a.jsonl", GOOD + b"null\n", r", line 2", r"expected an object with the key 'text', found NoneType", ["good"]),
    (
        "a.jsonl",
        GOOD + b'{"body": "b", "id": 1}',
        r", line 2",
        r"no 'text'; it has body, id \(set text_column\)",
        ["good"],
    ),
    ("a.jsonl", GOOD + b"{}", r", line 2", r"no 'text'; it has nothing.*", ["good"]),
    ("a.jsonl", b'{"text": 7}\n' + GOOD, r", line 1", r"'text' should be text, found int", ["good"]),
    ("a.jsonl", b'{"text": null}\n' + GOOD, r", line 1", r"'text' should be text, found NoneType", ["good"]),
    ("a.jsonl", b'{"text": ["a"]}\n' + GOOD, r", line 1", r"'text' should be text, found list", ["good"]),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r", line 2", r"not UTF-8 \(byte 10 of the line, 0xff\)", ["good"]),
    ("a.jsonl", GOOD + SURROGATE, r", line 2", r"holds half a surrogate pair \(character 2\)", ["good"]),
    ("a.jsonl", GOOD + b'{"text": "\xed\xa0\xbd"}', r", line 2", r"not UTF-8 .*", ["good"]),
    ("a.jsonl", GOOD + b"[" * 100_000, r", line 2", r"not JSON: nested too deeply", ["good"]),
    ("a.jsonl", b"", "", r"is empty: a file of rows has at least one", []),
    ("a.jsonl.gz", gzip.compress(GOOD + b"{\n" + GOOD, mtime=0), r", line 2", r"not JSON: .*", ["good", "good"]),
    ("a.jsonl.gz", b"", "", r"is empty: a file of rows has at least one", []),
    ("a.jsonl.gz", b"no gzip", "", r"cannot be read: the compressed data is damaged: .*", []),
    ("a.jsonl.zst", b"no zstd", "", r"cannot be read: the compressed data is damaged: .*", []),
    (
        "a.jsonl.gz",
        gzip.compress(GOOD, mtime=0) + b"garbage" * 9,
        "",
        r"cannot be read behind line 1: .*damaged.*",
        ["good"],
    ),
    ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, "", r"cannot be read: .*damaged.*", []),
    ("a.txt", b"line\nbad \xff\n", r", line 2", r"not UTF-8 \(byte 9\)", []),
    ("a.txt", b"\xef\xbb\xbfline\n\nend \xe4\xb8", r", line 3", r"not UTF-8 \(byte 13\)", []),
    ("a.txt.gz", truncated(gzip.compress(b"text", mtime=0)), "", r"cannot be read: .*truncated", []),
    ("a.txt.gz", b"", "", r"cannot be read: the file ends before it begins: it is truncated", []),
    ("a.parquet", b"", "", r"is empty: no parquet", []),
    ("a.parquet", b"PAR1 no parquet PAR1", "", r"not readable as parquet: .*", []),
    ("a.parquet", truncated(parquet(text=["a"])), "", r"not readable as parquet: .*", []),
    ("a.parquet", parquet(body=["a"], id=[1]), "", r"no 'text'; it has body, id \(set text_column\)", []),
    ("a.parquet", parquet(text=["a", None, "c"]), r", row 1", r"'text' should be text, found NoneType", ["a", "c"]),
    ("a.parquet", parquet(text=[7]), r", row 0", r"'text' should be text, found int", []),
    ("a.parquet", binary_as_string(b"a", b"\xff", b"c"), r", row 1", r"not UTF-8 \(byte 0 of the text\)", ["a", "c"]),
    ("a.lit", b"x = {'a': 'b', 'c': '\\ud800'}", r", text 1", r"holds half a surrogate.*", ["b"]),
    ("a.lit", b"x = f()", "", r"expected assignments of literals only: .*", []),
    ("a.lit", b"x = {'a': 1}", "", r"assigns no dict of strings.*", []),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3][:20]}")
def test_bad_input_is_named_and_fatal_or_counted(tmp_path, case):
    name, data, place, reason, texts = case
    path = tmp_path / name
    path.write_bytes(data)
    kind = {"format": "python_literals"} if name.endswith(".lit") else {}
    with pytest.raises(UserError) as problem:
        read(path, "fail", **kind)
    assert re.match(
        rf"{re.escape(str(path))}{place}: {reason}\. Mend or exclude it; on_error: skip", str(problem.value)
    )
    found, bad = read(path, "skip", **kind)
    assert found == texts
    assert bad.counts == 1
    ((named, why),) = bad.first
    assert named == f"{path}{place}"
    assert re.fullmatch(reason, why)


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("zst", ZSTD)])
def test_of_an_archive_that_breaks_off_the_beginning_counts(tmp_path, suffix, pack):
    texts = [f"{i} {hash((i, 'x'))} " * 9 for i in range(20_000)]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(truncated(pack(b"".join(map(row, texts)))))
    found, bad = read(path, "skip")
    assert 5_000 < len(found) < 15_000
    assert found == texts[: len(found)]
    assert bad.counts == 1
    assert bad.first == [(str(path), f"cannot be read behind line {len(found)}: {TRUNCATED}")]
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: cannot be read behind line {len(found)}: {TRUNCATED}"):
        read(path, "fail")


TRUNCATED = "the file ends within the compressed data: it is truncated"


def test_of_damaged_parquet_the_rows_before_count(tmp_path):
    texts = [f"{i} {hash((i, 'y'))} " * 20 for i in range(5_000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)
    for size, expected in ((HUGE, texts[:3000]), (100_000, texts[:3000] + texts[4000:])):
        found, bad = read(path, "skip", size)
        assert found == expected
        assert bad.counts == 1
        assert bad.first[0][0] == str(path)
        assert "row 3000" in bad.first[0][1]


@pytest.mark.parametrize("partition_bytes", [HUGE, 500, 20])
def test_lines_are_counted_from_the_beginning_of_the_file_in_every_piece(tmp_path, partition_bytes):
    bad_lines = [3, 4, 50, 51, 120, 200]
    rows = [b"{bad\r\n" if n in bad_lines else b"\n" if n % 7 == 6 else row(f"text {n}") for n in range(1, 201)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(rows))
    found, bad = read(path, "skip", partition_bytes)
    assert [place for place, _ in bad.first] == [f"{path}, line {n}" for n in bad_lines]
    assert found == [f"text {n}" for n in range(1, 201) if n not in bad_lines and n % 7 != 6]


def test_far_into_a_large_file_places_that_are_skipped_are_bytes(tmp_path, monkeypatch):
    """To count the lines before, each piece would read all that lies before it."""
    monkeypatch.setattr(jsonl, "_COUNTED", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b"{bad\n" if n in (3, 190) else row(f"text {n}") for n in range(200)))
    place = path.read_bytes().rindex(b"{bad")
    _, bad = read(path, "skip", 300)
    assert [where for where, _ in bad.first] == [f"{path}, line 4", f"{path}, byte {place}"]
    path.write_bytes(path.read_bytes().replace(b"{bad\n", b"", 1))
    with pytest.raises(UserError, match="line 190: not JSON"):  # it is the only one
        read(path, "fail", 300)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.jsonl").write_bytes(GOOD)
    (tmp_path / "folder.jsonl").write_bytes(GOOD)
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    source = SourceConfig(name="s", files=[f"{tmp_path}/*.jsonl"])
    pieces = pieces_of(source, HUGE)
    for name in ("gone.jsonl", "folder.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "folder.jsonl").mkdir()
    bad = BadInput("skip")
    assert [doc.text for piece in pieces for doc in read_piece(source, piece, bad)] == ["good"]
    assert [(Path(place).name, reason[: len("cannot be read: ")]) for place, reason in bad.first] == [
        (name, "cannot be read: ") for name in ("folder.jsonl", "gone.jsonl", "link.jsonl")
    ]
    for piece, reason in zip(pieces, ["Is a directory", "No such file", None, "No such file"], strict=True):
        if reason is not None:
            with pytest.raises(UserError, match=f"{piece.files[0].path}: cannot be read: .*{reason}"):
                list(read_piece(source, piece, BadInput("fail")))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(
    ("name", "data", "texts", "places"),
    [
        ("a.txt", b"", [""], [""]),
        ("a.txt", b"\xef\xbb\xbf", [""], [""]),
        ("a.jsonl", GOOD + row("") + row("") + GOOD, ["good", "", "", "good"], [", byte 17", ", byte 30"]),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), [], [""]),
        ("a.parquet", parquet(text=["a", ""]), ["a", ""], [", row 1"]),
        ("a.parquet", parquet(text=pyarrow.array([], pyarrow.string())), [], [""]),
    ],
)
def test_empty_documents_are_no_error_but_named_and_counted(tmp_path, name, data, texts, places, on_error):
    path = tmp_path / name
    path.write_bytes(data)
    found, bad = read(path, on_error)
    assert found == texts
    assert bad.counts == 0
    assert bad.empty == len(places)
    assert bad.first_empty == [f"{path}{place}" for place in places]


def test_a_bad_row_or_file_is_left_out_of_a_joined_document(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jsonl").write_bytes(GOOD + b"{\n" + GOOD)
    (tmp_path / "a/2.txt").write_bytes(b"\xff")
    (tmp_path / "a/3.txt").write_bytes(b"end")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.txt").write_bytes(b"\xff")
    found, bad = read(tmp_path / "*/*", "skip", join="folder", header="# {path}")
    assert found == ["# a/1.jsonl\ngood\n\ngood\n\n# a/3.txt\nend"]
    places = [place.removeprefix(f"{tmp_path}/") for place, _ in bad.first]
    assert places == ["a/1.jsonl, line 2", "a/2.txt, line 1", "b/1.txt, line 1"]


def test_what_several_readers_noted_is_joined_in_order():
    readers = [BadInput("skip") for _ in range(3)]
    for number, bad in enumerate(readers):
        for i in range(6):
            bad(f"file {number}, line {i}", "reason")
            bad.found_empty(f"file {number}, byte {i}")
    joined = BadInput.joined(json.loads(json.dumps([bad.as_dict() for bad in readers])))
    assert (joined.counts, joined.empty) == (18, 18)
    order = [(number, i) for number in range(3) for i in range(6)][:10]
    assert joined.first == [(f"file {number}, line {i}", "reason") for number, i in order]
    assert joined.first_empty == [f"file {number}, byte {i}" for number, i in order]


@pytest.fixture
def recipe(tmp_path, small_tokenizer):
    """Six good files with a bad one, or a bad row, of most kinds."""
    folder = tmp_path / "docs"
    folder.mkdir()
    texts = [f"alpha beta gamma {i} " * 30 for i in range(200)]
    (folder / "a.jsonl").write_bytes(b"".join(map(row, texts[:50])) + b"{bad\n" + b"".join(map(row, texts[50:100])))
    packed = gzip.compress(b"".join(row(f"{text} {hash(text)}") for text in texts[100:150]))
    (folder / "b.jsonl.gz").write_bytes(packed[:-20])
    (folder / "c.txt").write_bytes(b"delta " * 500 + b"\xff")
    (folder / "d.parquet").write_bytes(parquet(text=[*texts[150:], None, ""]))
    (folder / "e.txt").write_bytes(b"")
    content = {
        "out": str(tmp_path / "out"),
        "max_seq_len": 64,
        "partition_bytes": 10_000,
        "tokenizer": {"name": str(small_tokenizer)},
        "sources": [{"name": "docs", "files": [f"{folder}/*"]}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, content, folder


def test_a_bad_row_stops_prep_and_leaves_no_output(recipe):
    path, content, folder = recipe
    code = "from llmtrain.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "prep", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{folder}/a.jsonl, line 51: not JSON" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not Path(content["out"]).exists()


def test_skipped_rows_reach_the_manifest_and_the_totals(recipe):
    _, content, folder = recipe
    console = Console(file=io.StringIO(), width=500)
    made = run(PrepRecipe.model_validate({**content, "on_error": "skip"}), console)
    assert made["bad_input"]["bad"] == 4
    places = [place.removeprefix(f"{folder}/") for place, _ in made["bad_input"]["first_bad"]]
    assert places == ["a.jsonl, line 51", "b.jsonl.gz", "c.txt, line 1", "d.parquet, row 50"]
    assert made["bad_input"]["empty"] == 2
    assert made["bad_input"]["first_empty"] == [f"{folder}/d.parquet, row 51", f"{folder}/e.txt"]
    documents = made["splits"]["train"]["documents"]
    assert 150 <= documents < 200
    printed = console.file.getvalue()
    assert "4 rows or files" in printed
    assert f"{folder}/a.jsonl, line 51: not JSON" in printed
    assert "2 empty documents" in printed

    # What was left out makes no difference to the rest: the same as without it.
    shards = sorted(Path(content["out"]).rglob("*.mds.zstd"))
    before = [shard.read_bytes() for shard in shards]
    shutil.rmtree(content["out"])
    lines = (folder / "a.jsonl").read_bytes().split(b"\n")
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines[:50], b"    ", *lines[51:]]))
    (folder / "c.txt").unlink()
    again = run(PrepRecipe.model_validate({**content, "on_error": "skip"}), Console(file=io.StringIO()))
    assert again["bad_input"]["bad"] == 2
    assert [shard.read_bytes() for shard in sorted(Path(content["out"]).rglob("*.mds.zstd"))] == before


def test_places_do_not_depend_on_the_partitions(recipe):
    _, content, _ = recipe
    found = []
    for size in (1_000, 50_000):
        changed = {**content, "on_error": "skip", "partition_bytes": size, "out": f"{content['out']}-{size}"}
        found.append(run(PrepRecipe.model_validate(changed), Console(file=io.StringIO()))["bad_input"])
    assert all(one == other for one, other in pairwise(found))
