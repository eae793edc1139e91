"""Rows read by their place are those that Streaming reads; whatever is odd about a shard is left to Streaming."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import fixed_rows
from llmtrain.data.fixed_rows import FixedRows
from llmtrain.data.guarded_streaming import GuardedDataset, ShardError
from llmtrain.prep.mds import ShardWriter

N = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 rows of 32 tokens in 6 shards or so, not compressed."""
    rows = np.arange(N * 32, dtype=np.uint16).reshape(N, 32) % 300
    with ShardWriter(
        tmp_path / "s", seq_len=32, dtype=np.dtype(np.uint16), compression=None, size_limit=1000
    ) as writer:
        writer.write(rows)
    return tmp_path / "s"


def read(rows: FixedRows, dataset: Any, sample_id: int) -> Any:
    return rows.read(*dataset.spanner[sample_id])


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_rows_are_those_of_streaming_and_few_files_stay_open(loader, folder, monkeypatch) -> None:
    monkeypatch.setattr(fixed_rows, "_MOST", 2)
    dataset = loader(local=str(folder)).dataset
    before = open_files()
    rows = FixedRows(dataset.shards)
    for sample_id in [*range(N), *range(0, N, 7)]:
        expected = GuardedDataset.get_item(dataset, sample_id)["tokens"]
        found = read(rows, dataset, sample_id)
        assert found.dtype == expected.dtype
        assert (found == expected).all()
        assert open_files() <= before + 2
    copy = pickle.loads(pickle.dumps(rows))  # as a worker gets it that is not forked
    assert (read(copy, dataset, 5) == read(rows, dataset, 5)).all()
    del rows, copy
    assert open_files() == before


def test_odd_shards_are_left_to_streaming(loader, folder) -> None:
    dataset = loader(local=str(folder)).dataset
    last = sorted(folder.glob("shard*.mds"))[-1]
    whole = last.read_bytes()
    for damaged in (whole[:-3], whole[:6], b"", bytes([whole[0] + 1]) + whole[1:]):
        last.write_bytes(damaged)
        rows = FixedRows(dataset.shards)
        assert read(rows, dataset, N - 1) is None
        assert read(rows, dataset, 0) is not None
    last.write_bytes(whole)
    assert read(rows, dataset, N - 1) is not None
    os.truncate(last, len(whole) - 3)  # while it is open
    assert read(rows, dataset, N - 1) is None
    with pytest.raises(ShardError, match="cannot be read"):
        dataset.get_item(N - 1)


def test_a_file_that_can_no_longer_be_read_is_opened_anew(loader, folder) -> None:
    """On NFS, reading what somebody replaced fails for whoever has the old one open."""
    dataset = loader(local=str(folder)).dataset
    expected = dataset.get_item(3)["tokens"]
    shard_id, _ = dataset.spanner[3]
    shard = dataset._rows._files[shard_id]
    os.close(shard.file)
    dataset._rows._files[shard_id] = shard._replace(file=os.open(folder, os.O_RDONLY))  # a folder: reading it fails
    assert (dataset.get_item(3)["tokens"] == expected).all()
    assert shard_id not in dataset._rows._files
    assert (dataset.get_item(3)["tokens"] == expected).all()
    assert shard_id in dataset._rows._files


@pytest.mark.parametrize("encoding", ["ndarray:uint16", "bytes"])
def test_rows_without_a_fixed_length(loader, tmp_path, encoding: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "old"), columns={"tokens": encoding}) as writer:
        for n in range(9):
            row = np.full(32, n, np.uint16)
            writer.write({"tokens": row.astype(np.int64).tobytes() if encoding == "bytes" else row})
    made = loader(local=str(tmp_path / "old"), batch_size=3)
    assert FixedRows(made.dataset.shards).read(0, 0) is None
    assert sorted(n for batch in made for n in batch["input_ids"][:, 0].tolist()) == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_with_a_limit_stays_below_it(loader, folder, tmp_path, workers: int) -> None:
    """Deleted shards are not kept on the disk by a file that is open."""
    cache, limit = tmp_path / "cache", 7000
    made = loader(remote=str(folder), local=str(cache), cache_limit=limit, workers=workers, batch_size=4, predownload=4)
    assert made.dataset._rows is None
    seen = 0
    for batch in made:
        seen += len(batch["sample_id"])
        assert sum(path.stat().st_size for path in cache.glob("shard*")) <= limit
    assert seen == N


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_somebody_deletes_are_fetched_again(loader, folder, tmp_path, workers: int) -> None:
    made = loader(remote=str(folder), local=str(tmp_path / "cache"), workers=workers, batch_size=4, shuffle=True)
    for _ in range(3):
        assert sum(len(batch["sample_id"]) for batch in made) == N
        for shard in (tmp_path / "cache").glob("shard*"):
            shard.unlink()
    shutil.rmtree(tmp_path / "cache")
