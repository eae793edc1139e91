import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.conversations.formats import parse
from llmtrain.conversations.rows import hf_rows, identity_of_dataset
from llmtrain.errors import UserError

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path):
    """A local dataset of the layout that `datasets` knows: a file a split."""
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), data / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:3]), data / "test-00000-of-00001.parquet")
    return tmp_path / "set"


def test_local_folder_by_split(folder):
    rows = list(hf_rows(str(folder), "train"))
    assert [dict(row.data) for row in rows] == ROWS
    assert (rows[7].place, rows[7].number) == (f"{folder}[train], row 7", 7)
    assert parse(rows[7].data).response == "answer 7"
    assert len(list(hf_rows(str(folder), "test", safe_load=True))) == 3
    assert [dict(row.data) for row in hf_rows(str(folder), "train[5:7]")] == ROWS[5:7]


def test_jsonl_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    assert [dict(row.data) for row in hf_rows(str(tmp_path))] == ROWS


def test_builder_with_local_files_reads_past_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode() + b'{"prompt": "\xff"}\n' + LINES.encode())
    for data_files in (str(path), [str(path)], {"train": str(path)}):
        rows = list(hf_rows("json", "train", {"data_files": data_files}))
        assert [row.place for row in rows if row.problem] == [f"{path}, line 21"]
        assert len(rows) == 41
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        list(hf_rows("json", "val", {"data_files": {"train": str(path)}}))


def test_builder_with_options_of_its_own(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"data": ROWS}))
    rows = hf_rows("json", "train", {"data_files": str(tmp_path / "a.json"), "field": "data"})
    assert [dict(row.data) for row in rows] == ROWS


def test_object_store_folder_is_fetched_once(tmp_path, monkeypatch):
    store = tmp_path / "bucket" / "set"
    store.mkdir(parents=True)
    (store / "train-clean.jsonl").write_text(LINES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("streaming.base.storage.CloudDownloader.get", lambda remote: _Folder(tmp_path))
    assert [dict(row.data) for row in hf_rows("s3://bucket/set", "train-clean")] == ROWS
    (store / "train-clean.jsonl").unlink()
    assert len(list(hf_rows("s3://bucket/set/", "train-clean"))) == 20
    with pytest.raises(UserError, match=r"none of the files of split 'val' \(val\.jsonl: FileNotFoundError"):
        list(hf_rows("s3://bucket/set", "val"))
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["train-clean.jsonl"]


class _Folder:
    """Stands for a bucket: what is asked for as s3://... is copied from a folder."""

    def __init__(self, root):
        self.root = root

    def download(self, remote, local, timeout):
        from pathlib import Path

        Path(local).parent.mkdir(parents=True, exist_ok=True)
        Path(local).write_bytes((self.root / remote.removeprefix("s3://")).read_bytes())

    def clean_up(self):
        pass


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match=r"\[nope\] cannot be opened"):
        list(hf_rows(str(folder), "nope"))
    with pytest.raises(UserError, match="may not set trust_remote_code"):
        list(hf_rows(str(folder), hf_kwargs={"trust_remote_code": True}))
    (folder / "set.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"safe_load: .* holds more than .*set\.py"):
        list(hf_rows(str(folder), safe_load=True))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.jsonl").write_text(LINES + "{broken\n")
    with pytest.raises(UserError, match=r"broken\[train\].*name the files"):
        list(hf_rows(str(broken)))


def test_identity(folder, tmp_path):
    first = identity_of_dataset(str(folder), "train", {})
    assert first == identity_of_dataset(str(folder), "train", {})
    assert first != identity_of_dataset(str(folder), "test", {})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:9]), folder / "data" / "train-00000-of-00001.parquet")
    assert first != identity_of_dataset(str(folder), "train", {})
    (tmp_path / "a.jsonl").write_text(LINES)
    data_files = {"data_files": str(tmp_path / "a.jsonl")}
    first = identity_of_dataset("json", "train", data_files)
    (tmp_path / "a.jsonl").write_text(LINES * 2)
    assert first != identity_of_dataset("json", "train", data_files)


def test_identity_holds_no_token():
    """It stands in prep.json, as text."""
    asked = [
        identity_of_dataset("a/b", hf_kwargs={"token": token}, ask_hub=False) for token in ("planted1", "planted2")
    ]
    assert "planted" not in asked[0]
    assert asked[0] == asked[1]


def test_import_is_light():
    code = (
        "import sys, llmtrain.conversations.rows, llmtrain.conversations.preprocessing as p; p.registered(); "
        "print(sorted({'torch', 'datasets', 'streaming', 'transformers', 'composer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
