"""The failures that Streaming passes over, produced for real: deleted, damaged and hanging shards."""

import shutil

import numpy as np
import pytest

from llmtrain.data.guarded_streaming import GuardedStream, ShardError
from llmtrain.prep.mds import ShardWriter
from llmtrain.redaction import without_password

N = 60


@pytest.fixture
def folder(tmp_path):
    """60 rows in 6 shards or so."""

    def make(compression):
        rows = np.arange(N * 32, dtype=np.uint16).reshape(N, 32) % 300
        with ShardWriter(
            tmp_path / "remote", seq_len=32, dtype=np.dtype(np.uint16), compression=compression, size_limit=1000
        ) as writer:
            writer.write(rows)
        return tmp_path / "remote"

    return make


def shard(folder, number=3):
    (path,) = folder.glob(f"shard.{number:05}.mds*")
    return path


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def damage(kind, path):
    if kind == "missing":
        path.unlink()
    elif kind == "flipped":
        flip(path)
    else:
        path.write_bytes(path.read_bytes()[:-40])


def n_samples(loader):
    return sum(len(batch["sample_id"]) for batch in loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd:1"])
@pytest.mark.parametrize("kind", ["missing", "flipped", "truncated"])
def test_bad_shard_at_the_remote_raises_and_heals(loader, folder, tmp_path, kind, compression, workers):
    remote = folder(compression)
    good = tmp_path / "good"
    shutil.copytree(remote, good)
    damage(kind, shard(remote))
    cache = tmp_path / "cache"
    made = loader(remote=str(remote), local=str(cache), workers=workers, batch_size=4, download_retry=1, shuffle=True)
    with pytest.raises(ShardError, match=r"shard\.00003\.mds.*cannot be read") as raised:
        n_samples(made)
    assert "Traceback" not in str(raised.value)
    del made
    assert not list(cache.glob("shard.00003*"))
    shutil.copy(shard(good), remote)
    assert n_samples(loader(remote=str(remote), local=str(cache), workers=workers, batch_size=4)) == N


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_cached_copy_is_fetched_again(loader, folder, tmp_path, workers):
    remote = folder("zstd:1")
    cache = tmp_path / "cache"
    shutil.copytree(remote, cache)
    flip(shard(cache))
    made = loader(remote=str(remote), local=str(cache), workers=workers, batch_size=4)
    assert n_samples(made) == N


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["flipped", "truncated"])
@pytest.mark.parametrize("as_remote", [False, True])
def test_the_only_copy_is_never_deleted(loader, folder, kind, workers, as_remote):
    only = folder("zstd:1")
    damage(kind, shard(only))
    before = shard(only).read_bytes()
    where = {"remote": str(only)} if as_remote else {}  # the same folder as both
    made = loader(local=str(only), workers=workers, batch_size=4, **where)
    with pytest.raises(ShardError, match=r"shard\.00003\.mds\.zstd.*Prepare or copy the data again"):
        n_samples(made)
    assert (only / "shard.00003.mds.zstd").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_uncompressed_only_copy_is_looked_at_before_it_is_read(loader, folder, workers, kind):
    only = folder(None)
    damage(kind, shard(only))
    with pytest.raises(ShardError, match=r"shard\.00003\.mds cannot be read: Checksum failure.*copy the data again"):
        n_samples(loader(local=str(only), workers=workers, batch_size=4))
    assert shard(only).exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bit_that_flips_in_the_cache_between_two_runs(loader, folder, tmp_path, workers):
    remote, cache = folder("zstd:1"), tmp_path / "cache"
    first = loader(remote=str(remote), local=str(cache), batch_size=4)
    rows = [batch["input_ids"].tolist() for batch in first]
    assert shard(cache).suffix == ".mds"  # decompressed: Streaming never looks at it again
    flip(shard(cache))
    del first
    again = loader(remote=str(remote), local=str(cache), workers=workers, batch_size=4)
    if workers == 0:
        assert [batch["input_ids"].tolist() for batch in again] == rows
    else:
        assert n_samples(again) == N
    assert shard(cache).read_bytes() != shard(remote).read_bytes()


def test_second_iteration_over_the_same_dataset_is_noticed(loader, folder):
    made = loader(local=str(folder("zstd:1")), batch_size=4)
    first = iter(made.dataset)
    next(first)
    next(iter(made.dataset))
    with pytest.raises(ShardError, match="the epoch ended after"):
        list(first)


def test_worker_that_hangs_is_an_error(loader, folder, monkeypatch):
    from llmtrain.data import text

    made = loader(local=str(folder("zstd:1")), batch_size=4, workers=1)
    made.timeout = 2
    monkeypatch.setattr(text.TextDataset, "get_item", lambda self, *a: __import__("time").sleep(30))
    with pytest.raises(ShardError, match="no batch from the loader's workers within 2 s"):
        n_samples(made)


def test_passwords_are_not_shown(tmp_path):
    stream = GuardedStream(remote=str(tmp_path), local=str(tmp_path / "l"))
    stream.remote, stream.name, stream.split = "sftp://me:secret@host:22/data", "books", "train"
    assert stream.describe() == "stream 'books' (sftp://me:***@host:22/data/train)"
    assert without_password("cannot reach sftp://me:s3c:ret@host/x") == "cannot reach sftp://me:***@host/x"
    assert without_password("s3://bucket/a@b") == "s3://bucket/a@b"
