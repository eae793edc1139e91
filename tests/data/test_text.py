import json
import re
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from streaming import MDSWriter

from llmtrain.data.batch import sample_ids
from llmtrain.data.config import TextDatasetConfig
from llmtrain.data.text import canonical_nodes
from llmtrain.errors import UserError
from llmtrain.prep.mds import ShardWriter

ROWS = np.random.default_rng(0).integers(0, 250, (40, 48))


def shards(folder, encoding="ndarray:uint16", rows=ROWS, column="tokens", encode=None, **kwargs):
    with MDSWriter(out=str(folder), columns={column: encoding}, **kwargs) as writer:
        for row in rows:
            writer.write({column: encode(row) if encode else row})
    return str(folder)


def everything(loader):
    batches = list(loader)
    ids = torch.cat([batch["sample_id"] for batch in batches])
    return ids, torch.cat([batch["input_ids"] for batch in batches])


def test_training_batches_say_which_rows_they_have_and_evaluations_where_asked(loader, corpus):
    made = loader(return_sample_ids=False)
    (first, *_) = list(made)
    assert sample_ids(first) == [[number] for number in range(8)]
    assert re.fullmatch(rf"{corpus.train}: shard shard\.\S+, row 9", made.dataset.place(9))
    assert sample_ids(next(iter(loader(return_sample_ids=False, build={"evaluation": True})))) == []


def test_batches_of_prepared_shards(loader, corpus):
    made = loader(eos_token_id=0)
    batches = list(made)
    ids = torch.cat([batch["sample_id"] for batch in batches])
    assert ids.tolist() == list(range(made.dataset.num_samples))  # unshuffled: once each, in order
    for batch in batches:
        assert set(batch) == {"input_ids", "labels", "sequence_id", "sample_id"}
        assert batch["input_ids"].shape[1] == 32
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["labels"])
    assert len(batches) == len(made) == -(-len(ids) // 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_comes_and_epochs_differ(loader, workers):
    made = loader(shuffle=True, workers=workers)
    first, second = everything(made)[0], everything(made)[0]
    n = made.dataset.num_samples
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(n))
    assert first.tolist() != second.tolist() != list(range(n))


@pytest.mark.parametrize(
    ("rows", "shuffle", "parts"),
    [(10**9, False, 1), (10**9, True, 64), (64_000, True, 64), (63_999, True, 32), (9155, True, 8), (50, True, 1)],
)
def test_canonical_nodes_go_by_the_data(rows, shuffle, parts):
    assert canonical_nodes(rows, shuffle) == parts


def test_canonical_nodes_are_always_explicit(loader):
    assert loader(shuffle=True).dataset.num_canonical_nodes == 1
    made = loader(shuffle=True, num_canonical_nodes=64)
    assert made.dataset.num_canonical_nodes == 64
    rows = everything(made)[0].tolist()
    n = made.dataset.num_samples
    assert set(rows) == set(range(n))
    assert n < len(rows) < n + 64  # the price of equal parts
    with pytest.raises(UserError, match="100000 parts are too many"):
        loader(num_canonical_nodes=100_000)


@pytest.mark.parametrize(
    ("encoding", "encode", "settings"),
    [
        ("ndarray", lambda row: row.astype(np.int32), {}),
        ("ndarray:int32", lambda row: row.astype(np.int32), {}),
        ("ndarray:uint8:48", lambda row: row.astype(np.uint8), {}),
        ("ndarray:int64", lambda row: row, {}),
        ("ndarray:uint32:48", lambda row: row.astype(np.uint32), {}),
        ("bytes", lambda row: row.tobytes(), {}),
        ("bytes", lambda row: row.astype(np.uint16).tobytes(), {"token_encoding_type": "uint16"}),
    ],
)
@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_foreign_shards_of_every_type(loader, tmp_path, encoding, encode, settings, compression):
    """As llm-foundry writes them: any integer type, or bytes; longer rows are cut."""
    local = shards(
        tmp_path / "s", encoding, encode=encode, compression=compression, hashes=["sha1", "xxh64"], size_limit=4000
    )
    made = loader(local=local, **settings)
    ids, tokens = everything(made)
    assert np.array_equal(tokens.numpy(), ROWS[ids, :32])
    assert made.dataset.streams[0].validate_hash == "sha1"


def test_remote_and_cache(loader, corpus, tmp_path):
    made = loader(remote=str(corpus.train), local=str(tmp_path / "cache"))
    assert torch.equal(everything(made)[1], everything(loader())[1])
    assert (tmp_path / "cache" / "index.json").exists()


def test_split_is_a_folder_below(loader, corpus):
    assert (
        len(everything(loader(local=str(corpus.train.parent), split="val"))[0])
        == loader(local=str(corpus.val)).dataset.size
    )


def test_mixture_by_proportions(loader, corpus, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        shards(tmp_path / name, "ndarray:uint16:32", rows=np.full((100, 32), value, np.uint16))
    streams = {
        "a": {"local": str(tmp_path / "a"), "proportion": 3},
        "b": {"local": str(tmp_path / "b"), "proportion": 1},
    }
    made = loader(streams=streams, shuffle=True, batching_method="stratified", epoch_size=80)
    tokens = everything(made)[1]
    assert len(tokens) == 80
    assert (tokens == 1).all(dim=1).sum() == 60
    assert (tokens[:8, 0] == 1).sum() == 6  # in each batch, too


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"a": {"local": "x", "proportion": 1}, "b": {"local": "y"}}, "these have none: b"),
        ({"a": {"local": "x", "proportion": 1, "repeat": 2}}, "only one of"),
        ({"a": {"proportion": 1}}, "give local"),
        ({}, "streams is empty"),
    ],
)
def test_mistakes_in_streams(streams, message):
    with pytest.raises(ValidationError, match=message):
        TextDatasetConfig(max_seq_len=8, streams=streams)


def test_mistakes_in_places():
    with pytest.raises(ValidationError, match="no data"):
        TextDatasetConfig(max_seq_len=8)
    with pytest.raises(ValidationError, match="not both"):
        TextDatasetConfig(max_seq_len=8, local="x", streams={"a": {"local": "x"}})
    with pytest.raises(ValidationError, match="not both"):
        TextDatasetConfig(max_seq_len=8, local="x", eos_token_id=0, bos_token_id=0)


def test_wrong_tokenizer_is_refused_before_anything_is_read(loader, corpus, tmp_path):
    with pytest.raises(UserError, match="another tokenizer"):
        loader(fingerprint="0" * 64)
    with pytest.raises(UserError, match="another tokenizer"):  # the record travels with the index
        loader(fingerprint="0" * 64, remote=str(corpus.train), local=str(tmp_path / "cache"))
    loader(fingerprint="0" * 64, override_tokenizer_mismatch_error=True)


def test_tokenizer_is_found_in_prep_json_when_the_index_was_merged(loader, corpus, tmp_path):
    shutil.copytree(corpus.train.parent, tmp_path / "copy")
    index = tmp_path / "copy" / "train" / "index.json"
    index.write_text(
        json.dumps({key: value for key, value in json.loads(index.read_text()).items() if key != "llmtrain"})
    )
    with pytest.raises(UserError, match="another tokenizer"):
        loader(fingerprint="0" * 64, local=str(tmp_path / "copy" / "train"))


@pytest.mark.parametrize("workers", [0, 2])
def test_token_outside_of_the_vocabulary(loader, workers):
    with pytest.raises(
        UserError, match=r"shard\.00000\.\d+\.mds.*, row \d+: token id \d+ is outside .* of 100\b"
    ) as raised:
        list(loader(vocab_size=100, workers=workers))
    assert "Traceback" not in str(raised.value)


def test_wrong_token_encoding_type(loader, tmp_path):
    rows = [np.arange(250, 298)] * 4
    local = shards(tmp_path / "s", "bytes", rows=rows, encode=lambda row: row.astype(np.int32).tobytes())
    with pytest.raises(UserError, match="token_encoding_type"):
        list(loader(local=local))


def test_rows_that_are_too_short(loader, tmp_path):
    with pytest.raises(UserError, match="rows have 32 tokens, fewer than max_seq_len 64"):
        loader(max_seq_len=64)
    local = shards(tmp_path / "s", "ndarray:int64")  # the index does not tell
    with pytest.raises(UserError, match=r"shard\.00000\.mds, row 0: expected at least max_seq_len = 64"):
        list(loader(local=local, max_seq_len=64))


@pytest.mark.parametrize(
    ("encoding", "column", "value", "message"),
    [
        ("str", "text", "raw", "tokenize it with llmtrain prep"),
        ("int", "n", 1, "Its columns are n"),
        ("ndarray:float32", "tokens", np.ones(48, np.float32), "expected an integer ndarray"),
        ("ndarray:int32:2,48", "tokens", np.ones((2, 48), np.int32), "expected one dimension"),
        ("pkl", "tokens", [1], "unsafe type"),
    ],
)
def test_other_columns(loader, tmp_path, encoding, column, value, message):
    local = shards(tmp_path / "s", encoding, rows=[value] * 3, column=column)
    with pytest.raises(UserError, match=message):
        loader(local=local)


def test_missing_data_and_a_folder_too_high(loader, corpus, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.local: there is no folder"):
        loader(local=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"shards below: train, val"):
        loader(local=str(corpus.train.parent))
    with pytest.raises(UserError, match=r"dataset\.streams\.x\.remote: there is no folder"):
        loader(streams={"x": {"remote": str(tmp_path / "nowhere"), "local": str(tmp_path / "l")}})


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", ""])
def test_index_that_points_outside_of_its_folder(loader, corpus, tmp_path, name):
    shutil.copytree(corpus.train, tmp_path / "evil")
    index = json.loads((tmp_path / "evil" / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (tmp_path / "evil" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of its folder"):
        loader(local=str(tmp_path / "evil"))


def test_merged_index_with_folders_below_is_fine(loader, tmp_path):
    from streaming.base.util import merge_index

    for part in ("0", "1"):
        shards(tmp_path / "all" / part, "ndarray:int64")
    merge_index(str(tmp_path / "all"))
    assert np.array_equal(everything(loader(local=str(tmp_path / "all")))[1].numpy(), np.tile(ROWS[:, :32], (2, 1)))


def test_truncated_index_heals_when_there_is_a_remote(loader, corpus, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json").write_text((corpus.train / "index.json").read_text()[:50])
    with pytest.raises(UserError, match=r"index\.json cannot be fetched or read"):
        loader(remote=str(corpus.train), local=str(cache))
    assert len(everything(loader(remote=str(corpus.train), local=str(cache)))[0])


def test_truncated_index_of_the_only_copy_is_kept(loader, corpus, tmp_path):
    shutil.copytree(corpus.train, tmp_path / "only")
    (tmp_path / "only" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be fetched or read"):
        loader(local=str(tmp_path / "only"))
    assert (tmp_path / "only" / "index.json").exists()


def test_hash_that_the_shards_do_not_have(loader):
    with pytest.raises(UserError, match=r"validate_hash is 'sha1', but the shards have: xxh64"):
        loader(validate_hash="sha1")


def test_eos_must_be_the_tokenizers(loader):
    with pytest.raises(UserError, match="eos_token_id is 5, but the tokenizer's is 0"):
        loader(eos_token_id=5)
    loader(eos_token_id=5, override_eos_token_id_mismatch_error=True)


def test_less_than_one_batch(loader):
    with pytest.raises(UserError, match="not one full batch of 100000"):
        loader(batch_size=100_000, drop_last=True)


def test_nodes_that_do_not_divide(loader, monkeypatch):
    from streaming.base.world import World

    monkeypatch.setattr(World, "detect", classmethod(lambda cls: cls(3, 1, 1, 0)))
    with pytest.raises(UserError, match="64 is no multiple or divisor of the run's 3 nodes"):
        loader(shuffle=True, num_canonical_nodes=64)


def test_shards_with_a_tokens_record_from_our_writer(tmp_path, loader):
    with ShardWriter(
        tmp_path, seq_len=32, dtype=np.dtype(np.uint16), about={"tokenizer_fingerprint": "f" * 64}
    ) as writer:
        writer.write(ROWS[:, :32].astype(np.uint16))
    loader(local=str(tmp_path), fingerprint="f" * 64)
