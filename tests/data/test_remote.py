"""Training data streamed from S3 and SFTP over real protocols, into a bounded cache, over connections that break."""

import random
import threading
import time

import boto3
import numpy as np
import pytest

from llmtrain.data import guarded_streaming
from llmtrain.data.guarded_streaming import ShardError
from llmtrain.errors import UserError
from llmtrain.prep.mds import ShardWriter
from llmtrain.testing.remote import CuttingProxy, sftp_server

N, LENGTH = 2000, 32
SHARD = 11_000  # bytes at most, compressed and decompressed
PREFIX = "corpora/books/train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2000 rows that are all different, in some 20 shards."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    rows = np.random.default_rng(3).integers(0, 300, (N, LENGTH), np.uint16)
    with ShardWriter(folder, seq_len=LENGTH, dtype=rows.dtype, compression="zstd:1", size_limit=8000) as writer:
        writer.write(rows)
    assert len(list(folder.glob("shard.*"))) >= 15
    return folder


@pytest.fixture
def remote(request, monkeypatch, tmp_path, folder):
    """Makes the shards' URL, for a server behind a proxy that cuts connections."""
    monkeypatch.setattr(guarded_streaming, "FIRST_PAUSE", 0.05)
    stack = []

    def open_s3(**cut):
        port = int(request.getfixturevalue("s3").rpartition(":")[2])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        bucket = f"bucket-{random.getrandbits(40):x}"
        client.create_bucket(Bucket=bucket)
        for path in folder.iterdir():
            client.upload_file(str(path), bucket, f"{PREFIX}/{path.name}")
        proxy = CuttingProxy(port, **cut)
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        return f"s3://{bucket}/{PREFIX}", proxy

    def open_sftp(**cut):
        place = tmp_path / "server" / PREFIX
        place.mkdir(parents=True)
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        opened = sftp_server(tmp_path / "server")
        server = opened.__enter__()
        stack.append(opened)
        proxy = CuttingProxy(server.port, **cut)
        (tmp_path / "known_hosts").write_text(server.known_at(server.port, proxy.port))
        monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(tmp_path / "known_hosts"))
        return f"sftp://me:s3cret@127.0.0.1:{proxy.port}/{PREFIX}", proxy

    def make(kind, **cut):
        url, proxy = {"s3": open_s3, "sftp": open_sftp}[kind](**cut)
        stack.append(proxy)
        proxy.__enter__()
        return url, proxy

    yield make
    for opened in reversed(stack):
        opened.__exit__(None, None, None)


def sample_ids(loader):
    return sorted(int(i) for batch in loader for i in batch["sample_id"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_all_samples_come_through_a_bounded_cache(loader, remote, tmp_path, kind, workers):
    url, _ = remote(kind, every=0, after=0)
    cache, limit = tmp_path / "cache", 60_000
    made = loader(remote=url, local=str(cache), workers=workers, batch_size=50, cache_limit=limit)
    done, largest = threading.Event(), 0

    def watch():
        nonlocal largest
        while not done.is_set():
            size = 0
            for path in cache.glob("shard*"):
                try:
                    size += path.stat().st_size
                except FileNotFoundError:
                    continue
            largest = max(largest, size)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert sample_ids(made) == list(range(N))
    finally:
        done.set()
        watcher.join()
    # Streaming makes room before a download and counts it afterwards: two threads of each worker may do so at once.
    assert 10_000 < largest <= limit + 2 * max(1, workers) * SHARD


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_rows_are_those_that_were_written(loader, remote, tmp_path, kind, folder):
    def rows(made):
        found = {int(i): row for batch in made for i, row in zip(batch["sample_id"], batch["input_ids"], strict=True)}
        return np.stack([found[i] for i in range(N)])

    url, _ = remote(kind, every=0, after=0)
    far = rows(loader(remote=url, local=str(tmp_path / "cache"), batch_size=50))
    assert (far == rows(loader(local=str(folder), batch_size=50))).all()


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
@pytest.mark.parametrize(("kind", "every", "after"), [("s3", 3, 3_000), ("sftp", 1, 30_000)])
def test_connections_that_break_cost_retries_not_the_run(loader, remote, tmp_path, kind, every, after, reset):
    url, proxy = remote(kind, every=every, after=after, reset=reset)
    made = loader(remote=url, local=str(tmp_path / "cache"), batch_size=50, shuffle=True)
    assert sample_ids(made) == list(range(N))
    assert proxy.cuts >= 3
    assert not list((tmp_path / "cache").rglob("*.part*"))


def test_a_storage_that_is_gone_is_one_message_without_the_password(loader, remote, tmp_path):
    url, proxy = remote("sftp", every=0, after=0)
    made = loader(remote=url, local=str(tmp_path / "cache"), batch_size=50, download_retry=2)
    proxy.every, proxy.after = 1, 0
    proxy.__exit__()
    with pytest.raises(ShardError, match=r"sftp://me:\*\*\*@127.0.0.1:\d+/corpora.*shard\.00000\.mds.*cannot be read"):
        sample_ids(made)


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_a_place_without_shards_is_said_at_once(loader, remote, tmp_path, kind):
    url, proxy = remote(kind, every=0, after=0)
    with pytest.raises(UserError, match=r"index\.json cannot be fetched") as raised:
        loader(remote=f"{url}-2", local=str(tmp_path / "cache"))
    assert "s3cret" not in str(raised.value)
    assert proxy.connections <= 2


def test_what_a_killed_process_left_half_downloaded_is_not_taken_for_data(loader, remote, tmp_path, folder):
    url, _ = remote("s3", every=0, after=0)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json.tmp").write_bytes((folder / "index.json").read_bytes()[:100])
    (cache / "shard.00000.mds.zstd.part").write_bytes(b"half")
    assert sample_ids(loader(remote=url, local=str(cache), batch_size=50)) == list(range(N))
