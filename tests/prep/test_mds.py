import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import MDSWriter, StreamingDataset
from streaming.base.format.mds.reader import MDSReader

from llmtrain.errors import UserError
from llmtrain.prep.mds import ShardWriter, TextShardWriter, token_dtype


def rows_of(n, seq_len, dtype, seed=0):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (n, seq_len), dtype=dtype, endpoint=True)


def read(folder):
    """Through Streaming's own reader."""
    return [sample["tokens"] for sample in samples(folder)]


def samples(folder):
    index = json.loads((folder / "index.json").read_text())
    out = []
    for entry in index["shards"]:
        reader = MDSReader.from_json(str(folder), None, entry)
        if entry["zip_data"]:
            import zstandard

            raw = zstandard.decompress((folder / entry["zip_data"]["basename"]).read_bytes())
            (folder / entry["raw_data"]["basename"]).write_bytes(raw)
        out += [reader[i] for i in range(len(reader))]
    return out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    seq_len=st.integers(1, 33),
    wide=st.booleans(),
    compression=st.sampled_from([None, "zstd", "zstd:1"]),
    pieces=st.integers(1, 5),
    rows_a_shard=st.integers(1, 50),
)
def test_streaming_reads_what_was_written(tmp_path_factory, n, seq_len, wide, compression, pieces, rows_a_shard):
    folder = tmp_path_factory.mktemp("mds")
    dtype = np.dtype(np.uint32 if wide else np.uint16)
    rows = rows_of(n, seq_len, dtype)
    limit = 600 + rows_a_shard * (seq_len * dtype.itemsize + 4)
    with ShardWriter(folder, seq_len=seq_len, dtype=dtype, compression=compression, size_limit=limit) as writer:
        for piece in np.array_split(rows, pieces):
            writer.write(piece)
    got = read(folder)
    assert all(row.dtype == dtype for row in got)
    assert np.array_equal(np.stack(got), rows)
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        assert entry["raw_data"]["bytes"] <= limit


def test_same_bytes_as_streamings_own_writer(tmp_path):
    rows = rows_of(100, 16, np.dtype(np.uint16))
    with MDSWriter(
        out=str(tmp_path / "theirs"),
        columns={"tokens": "ndarray:uint16:16"},
        hashes=["sha256", "xxh64"],
        size_limit=1500,
    ) as theirs:
        for row in rows:
            theirs.write({"tokens": row})
    with ShardWriter(
        tmp_path / "ours",
        seq_len=16,
        dtype=np.dtype(np.uint16),
        compression=None,
        hashes=["sha256", "xxh64"],
        size_limit=1500,
    ) as ours:
        ours.write(rows)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) > 3
    for name in names:
        if name != "index.json":
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    index = [json.loads((tmp_path / who / "index.json").read_text()) for who in ("ours", "theirs")]
    assert index[0] == index[1]


def test_dataset_from_a_compressed_remote_with_hashes(tmp_path):
    rows = rows_of(50, 8, np.dtype(np.uint16))
    with ShardWriter(tmp_path / "r", seq_len=8, dtype=np.dtype(np.uint16), size_limit=700) as writer:
        writer.write(rows)
    dataset = StreamingDataset(
        remote=str(tmp_path / "r"), local=str(tmp_path / "l"), batch_size=1, validate_hash="xxh64"
    )
    assert np.array_equal(np.stack([row["tokens"] for row in dataset]), rows)


CHATS = st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.fixed_dictionaries({"messages": CHATS, "a": st.text()}), min_size=1, max_size=20),
    compression=st.sampled_from([None, "zstd:1"]),
    limit=st.integers(1, 3000),
)
def test_streaming_reads_texts_and_json(tmp_path_factory, rows, compression, limit):
    folder = tmp_path_factory.mktemp("mds")
    columns = {"messages": "json", "a": "str"}
    with TextShardWriter(folder, columns=columns, compression=compression, size_limit=limit) as writer:
        for row in rows:
            writer.write(row)
    assert samples(folder) == rows
    assert writer.samples == len(rows)
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        assert entry["raw_data"]["bytes"] <= limit or entry["samples"] == 1


def test_same_bytes_of_text_as_streamings_own_writer(tmp_path):
    rows = [{"prompt": "p" * (i % 7), "messages": [{"role": "user", "content": "x" * i}]} for i in range(100)]
    settings = {"columns": {"prompt": "str", "messages": "json"}, "hashes": ["xxh64"], "size_limit": 1500}
    with (
        MDSWriter(out=str(tmp_path / "theirs"), **settings) as theirs,
        TextShardWriter(tmp_path / "ours", compression=None, **settings) as ours,
    ):
        for row in rows:
            theirs.write(row)
            ours.write(row)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) > 3
    for name in names:
        ours_bytes, theirs_bytes = ((tmp_path / who / name).read_bytes() for who in ("ours", "theirs"))
        assert ours_bytes == theirs_bytes or json.loads(ours_bytes) == json.loads(theirs_bytes)


def test_no_index_after_an_exception(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, seq_len=8, dtype=np.dtype(np.uint16), size_limit=700) as writer:
            writer.write(rows_of(200, 8, np.dtype(np.uint16)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.glob("shard*"))
    assert not list(tmp_path.glob("index*"))


def test_row_larger_than_a_shard(tmp_path):
    with pytest.raises(UserError, match="size_limit"):
        ShardWriter(tmp_path, seq_len=1000, dtype=np.dtype(np.uint16), size_limit=1000)


@pytest.mark.parametrize(("vocab", "dtype"), [(2, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_dtype_holds_every_id(vocab, dtype):
    assert token_dtype(vocab).name == dtype
    assert vocab - 1 <= np.iinfo(token_dtype(vocab)).max
