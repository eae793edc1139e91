"""Files elsewhere: real protocols on the loopback, and connections that break."""

import gzip
import io
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace

import boto3
import pytest

from llmtrain.errors import UserError
from llmtrain.prep import storage
from llmtrain.prep.plan import InputFile
from llmtrain.prep.readers.files import opened
from llmtrain.prep.remote_work import RemoteWork
from llmtrain.prep.stores import retry
from llmtrain.prep.stores.open import open_store
from llmtrain.testing.remote import CuttingProxy, sftp_server

FILES = {
    "corpus/a.jsonl": b"a\n",
    "corpus/b.jsonl.zst": b"bb",
    "corpus/.hidden.jsonl": b"h",
    "corpus/more/c.jsonl": b"cc\n",
    "corpus/more/deep/d.jsonl": b"d" * 4,
    "corpus/more/.git/e.jsonl": b"e",
    "corpus-2/a.jsonl": b"2",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("llmtrain.prep.stores.open._opened", {})


@pytest.fixture
def s3_place(s3, monkeypatch):
    """An empty bucket, as a URL, and what its server's port is."""
    for name, value in {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "s3cret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    name = f"bucket-{random.getrandbits(40):x}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}", int(s3.rpartition(":")[2])


@pytest.fixture
def sftp_place(tmp_path, monkeypatch):
    """An empty folder of a server, as a URL, and the server's port."""
    root = tmp_path / "server"
    root.mkdir()
    known = tmp_path / "known_hosts"
    monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(known))
    with sftp_server(root) as server:
        known.write_text(server.known_at(server.port))
        yield f"sftp://me:s3cret@127.0.0.1:{server.port}/data", server.port


@pytest.fixture(params=["s3", "sftp"])
def place(request):
    """A URL to write below."""
    return request.getfixturevalue(f"{request.param}_place")[0]


def put(url, data):
    store, _, path = open_store(url)
    store.put(path, data)


def names(pattern, place):
    return [file.url.removeprefix(f"{place}/") for file in storage.glob_files(f"{place}/{pattern}")]


PATTERNS = {
    "corpus/*.jsonl": ["corpus/a.jsonl"],
    "corpus/a.jsonl": ["corpus/a.jsonl"],
    "corpus/*.jsonl*": ["corpus/a.jsonl", "corpus/b.jsonl.zst"],
    "corpus/**/*.jsonl": ["corpus/a.jsonl", "corpus/more/c.jsonl", "corpus/more/deep/d.jsonl"],
    "corpus/*/*.jsonl": ["corpus/more/c.jsonl"],
    "corpus*/a.jsonl": ["corpus-2/a.jsonl", "corpus/a.jsonl"],
    "corpus/[ab].*": ["corpus/a.jsonl", "corpus/b.jsonl.zst"],
    "corpus/[!a].*": ["corpus/b.jsonl.zst"],
    "corpus/?.jsonl": ["corpus/a.jsonl"],
    "corpus/.h*": ["corpus/.hidden.jsonl"],
    "corpus/more/**": ["corpus/more/c.jsonl", "corpus/more/deep/d.jsonl"],
    "corpus/z*": [],
    "corpus/z.jsonl": [],
    "nothing/*": [],
}


@pytest.mark.parametrize("kind", ["s3", "sftp", "local"])
def test_patterns_mean_the_same_everywhere(kind, request, tmp_path):
    here = str(tmp_path / "here")
    where = here if kind == "local" else request.getfixturevalue(f"{kind}_place")[0]
    for name, data in FILES.items():
        if kind == "local":
            (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "here" / name).write_bytes(data)
        else:
            put(f"{where}/{name}", data)
    assert {pattern: names(pattern, where) for pattern in PATTERNS} == PATTERNS
    for file in storage.glob_files(f"{where}/corpus/**"):
        assert file.size == len(FILES[file.url.removeprefix(f"{where}/")])
        assert abs(file.mtime / 1e9 - time.time()) < 300


def test_a_listing_of_several_pages_is_complete(s3_place, monkeypatch):
    place, _ = s3_place
    monkeypatch.setattr("llmtrain.prep.stores.s3.PAGE", 3)
    for number in range(10):
        put(f"{place}/x/{number}", b"")
    assert names("x/*", place) == [f"x/{number}" for number in range(10)]


def test_reading_and_seeking_gives_what_was_written(place):
    data = random.Random(1).randbytes(3_000_000)
    put(f"{place}/file", data)
    with storage.open_input(f"{place}/file") as file:
        assert file.read() == data
        assert file.read(1) == b""
    rng = random.Random(2)
    with storage.open_input(f"{place}/file") as file:
        local = io.BytesIO(data)
        for _ in range(60):
            offset, whence = rng.choice(
                [(rng.randrange(3_100_000), 0), (-rng.randrange(1000), 2), (rng.randrange(50), 1)]
            )
            length = rng.choice([0, 1, 100, 70_000, 1_000_000])
            assert file.seek(offset, whence) == local.seek(offset, whence)
            assert file.read(length) == local.read(length)


def test_compressed_lines_and_parquet(place):
    import pyarrow
    import pyarrow.parquet

    lines = [b"%d\n" % number for number in range(100_000)]
    put(f"{place}/x.gz", gzip.compress(b"".join(lines)))
    with storage.open_input(f"{place}/x.gz") as file:
        assert list(gzip.GzipFile(fileobj=file)) == lines
    table = pyarrow.table({"text": [f"document {number}" for number in range(50_000)], "other": range(50_000)})
    packed = io.BytesIO()
    pyarrow.parquet.write_table(table, packed, row_group_size=5_000)
    put(f"{place}/x.parquet", packed.getvalue())
    with storage.open_input(f"{place}/x.parquet") as file:
        opened = pyarrow.parquet.ParquetFile(file)
        assert opened.num_row_groups == 10
        assert opened.read_row_group(7, columns=["text"]).column(0)[0].as_py() == "document 35000"
        assert opened.read().equals(table)


def test_an_empty_file(place):
    put(f"{place}/empty", b"")
    assert storage.open_input(f"{place}/empty").read() == b""
    assert storage.read_bytes(f"{place}/empty") == b""


def test_a_file_that_is_not_there(place):
    put(f"{place}/other", b"")
    with pytest.raises(UserError, match=r"/none: there is no such file") as raised:
        storage.open_input(f"{place}/none")
    assert "s3cret" not in str(raised.value)
    assert storage.read_bytes(f"{place}/none") is None


def test_a_file_that_changes_while_it_is_read(place):
    put(f"{place}/file", b"1" * 2_000_000)
    with storage.open_input(f"{place}/file") as file:
        file.read(10)
        put(f"{place}/file", b"2" * 2_000_001)
        if place.startswith("sftp"):  # the file that is open stays the same one
            assert set(file.read()) == {ord("1")}
        else:
            with pytest.raises(UserError, match="was changed or deleted while it was being read"):
                file.read()


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize("every", [1, 2])
def test_s3_connections_that_break_cost_retries(s3_place, monkeypatch, every, reset):
    place, port = s3_place
    data = random.Random(3).randbytes(5_000_000)
    put(f"{place}/file", data)
    with CuttingProxy(port, every=every, after=400_000, reset=reset) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr("llmtrain.prep.stores.open._opened", {})
        with storage.open_input(f"{place}/file") as file:
            assert file.read() == data
        assert proxy.cuts >= 5 if every == 1 else proxy.cuts >= 1
        put(f"{place}/up", data[:300_000])
        put_again = lambda: retry.persistently(lambda: put(f"{place}/up", data), "writing")  # noqa: E731
        if every == 2:
            put_again()
        else:  # each attempt is cut: nothing but the old content is ever seen
            monkeypatch.setenv("LLMTRAIN_STORAGE_ATTEMPTS", "3")
            with pytest.raises(UserError, match="writing failed 3 times"):
                put_again()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("llmtrain.prep.stores.open._opened", {})
    assert storage.read_bytes(f"{place}/up") == (data if every == 2 else data[:300_000])


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_sftp_connections_that_break_cost_retries(sftp_place, tmp_path, monkeypatch, reset):
    place, port = sftp_place
    data = random.Random(3).randbytes(2_000_000)
    put(f"{place}/file", data)
    with CuttingProxy(port, every=1, after=500_000, reset=reset) as proxy:
        known = tmp_path / "known_hosts"
        known.write_text(known.read_text() + known.read_text().replace(str(port), str(proxy.port)))
        through = place.replace(str(port), str(proxy.port))
        with storage.open_input(f"{through}/file") as file:
            assert file.read() == data
        assert proxy.cuts >= 4
        proxy.every = 2
        retry.persistently(lambda: put(f"{through}/up", data), "writing")
    assert storage.read_bytes(f"{place}/up") == data
    assert sorted(storage.names_below(place)) == ["file", "up"]
    store, _, path = open_store(place)
    left = [path for path in (tmp_path / "server/data").iterdir() if path.name.endswith(".llmtrain")]
    store.prune(path, leftovers=True)
    assert not [path for path in left if path.exists()]


def test_a_file_that_was_replaced_by_one_of_its_size(place):
    put(f"{place}/a.jsonl", b"{}")
    (found,) = storage.glob_files(f"{place}/*.jsonl")
    planned = InputFile(found.url, "a.jsonl", found.size, found.mtime)
    with opened(planned) as data:
        assert data.read() == b"{}"
    with pytest.raises(UserError, match="has changed since"), opened(replace(planned, mtime=found.mtime - 10**9)):
        pass


def test_what_cannot_be_had_is_one_message_with_the_cause(s3_place, monkeypatch):
    place, _ = s3_place
    monkeypatch.setenv("LLMTRAIN_STORAGE_ATTEMPTS", "3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"opening s3://bucket-\w+/x failed 3 times.*127\.0\.0\.1:9"):
        storage.open_input(f"{place}/x")


def test_streamings_name_for_the_endpoint(s3_place, monkeypatch):
    place, _ = s3_place
    put(f"{place}/x", b"x")
    monkeypatch.setattr("llmtrain.prep.stores.open._opened", {})
    monkeypatch.setenv("S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert storage.read_bytes(f"{place}/x") == b"x"


def test_wrong_password_is_not_tried_again_and_not_shown(sftp_place):
    place, _ = sftp_place
    with pytest.raises(UserError, match="Authentication failed") as raised:
        storage.open_input(place.replace("s3cret", "wr0ng") + "/x")
    assert "wr0ng" not in str(raised.value)
    assert "times" not in str(raised.value)


def test_unknown_host_key_is_refused(sftp_place, tmp_path):
    (tmp_path / "known_hosts").write_text("")
    with pytest.raises(UserError, match=r"is not in known_hosts. Its key is ecdsa-\S+ SHA256:.*ssh-keyscan"):
        storage.open_input(f"{sftp_place[0]}/x")


def test_other_host_key_is_refused(sftp_place, tmp_path):
    import paramiko

    known = tmp_path / "known_hosts"
    other = paramiko.ECDSAKey.generate()
    known.write_text(f"[127.0.0.1]:{sftp_place[1]} {other.get_name()} {other.get_base64()}\n")
    with pytest.raises(UserError, match="does not match"):
        storage.open_input(f"{sftp_place[0]}/x")


@pytest.mark.parametrize("url", ["ftp://host/x", "s3:///x", "azure://account"])
def test_urls_that_are_none(url):
    with pytest.raises(UserError, match=r"supported|expected"):
        storage.open_input(url)


def test_windows_paths_and_files_are_not_remote(tmp_path):
    assert [storage.is_remote(path) for path in ("s3://b/x", "C:/x", "/x", tmp_path, "x:y", "sftp://h/x")] == [
        True,
        False,
        False,
        False,
        False,
        True,
    ]


def test_google_through_its_emulator(monkeypatch, tmp_path):
    pytest.importorskip("gcp_storage_emulator")
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
        monkeypatch.delenv("GCS_KEY", raising=False)
        data = random.Random(4).randbytes(900_000)
        (tmp_path / "file").write_bytes(data)
        put("gs://bucket/corpus/a.jsonl", data)
        put("gs://bucket/corpus/more/b.jsonl", tmp_path / "file")
        assert names("corpus/**/*.jsonl", "gs://bucket") == ["corpus/a.jsonl", "corpus/more/b.jsonl"]
        for name in ("a.jsonl", "more/b.jsonl"):
            with storage.open_input(f"gs://bucket/corpus/{name}") as file:
                assert file.read() == data
        assert storage.read_bytes("gs://bucket/none") is None
        work = RemoteWork("gs://bucket/out")
        with work.lock("output"):
            work.write("plan.json", b"{}")
            work.publish({"train/index.json": b"i", "prep.json": b"p"})
        assert set(storage.names_below("gs://bucket/out")) == {".files.json", "prep.json", "train/index.json"}
        work.discard()
        assert set(storage.names_below("gs://bucket/out")) == set()
    finally:
        server.stop()


def test_importing_it_imports_no_client():
    heavy = ["boto3", "botocore", "paramiko", "google.cloud", "azure.core", "pyarrow", "torch", "streaming"]
    code = (
        f"import sys, llmtrain.prep.storage, llmtrain.prep.remote_work; print([m for m in {heavy} if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
