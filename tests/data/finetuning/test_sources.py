"""Every kind of source: files, Hugging Face datasets, MDS shards local and remote, and mixtures of them."""

import json
import shutil

import numpy as np
import pytest
from streaming import MDSWriter

from llmtrain.data.finetuning.show import count
from llmtrain.errors import UserError
from tests.data.finetuning.conftest import chat, write_rows


def pairs(n):
    return [{"prompt": f"Say {number}.", "response": f" {number}: yes done"} for number in range(n)]


def write_mds(folder, columns, rows, **settings):
    with MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for row in rows:
            writer.write(row)
    return folder


def texts(loader, tokenizer):
    """The trained text of each example, in the order of the source."""
    data = loader.dataset
    return [
        tokenizer.decode(ids[trained])
        for ids, trained in (data.example(number) for number in range(len(data.order.lengths)))
    ]


ANSWERS = [f" {number}: yes done<|endoftext|>" for number in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(build, chat_tokenizer, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(pairs(5)))
    elif kind == "csv":
        path.write_text("prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in pairs(5)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs(5)), path)
    else:
        write_rows(path, pairs(5))
    assert texts(build(files=[str(tmp_path / "*")]), chat_tokenizer) == ANSWERS


def test_hugging_face_builders_and_folders(build, chat_tokenizer, tmp_path):
    write_rows(tmp_path / "train.jsonl", pairs(5))
    by_builder = build(hf_name="json", split="train", hf_kwargs={"data_files": str(tmp_path / "train.jsonl")})
    assert texts(by_builder, chat_tokenizer) == ANSWERS


def test_columns_are_mapped(build, chat_tokenizer, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"q": row["prompt"], "a": row["response"]} for row in pairs(5)])
    loader = build(files=str(path), preprocessing_fn={"prompt": "q", "response": "a"})
    assert texts(loader, chat_tokenizer) == ANSWERS
    with pytest.raises(UserError, match="there is nothing to train on: all 5 rows were dropped"):
        build(files=str(path))


def test_shards_of_prompts_and_responses(build, chat_tokenizer, tmp_path):
    write_mds(tmp_path / "s" / "train", {"prompt": "str", "response": "str"}, pairs(5))
    assert texts(build(local=str(tmp_path / "s"), split="train"), chat_tokenizer) == ANSWERS
    assert texts(build(remote=str(tmp_path / "s"), split="train"), chat_tokenizer) == ANSWERS


def test_shards_of_messages(build, chat_tokenizer, tmp_path):
    write_mds(tmp_path / "s", {"messages": "json"}, [chat(number, 1) for number in range(5)])
    assert texts(build(local=str(tmp_path / "s")), chat_tokenizer) == [
        f"{number}: yes done<|im_end|>" for number in range(5)
    ]


def test_tokenized_shards_of_llm_foundry(build, chat_tokenizer, tmp_path):
    turns = [[{"input_ids": [5, 6, number], "labels": [7, 8]}] for number in range(4)]
    write_mds(tmp_path / "s", {"turns": "json"}, [{"turns": turn} for turn in turns])
    data = build(local=str(tmp_path / "s")).dataset
    ids, trained = data.example(3)
    assert ids[:5].tolist() == [5, 6, 3, 7, 8]
    assert trained[:5].tolist() == [False] * 3 + [True] * 2

    old = [{"input_ids": np.array([5, 6], np.int32).tobytes(), "labels": np.array([7], np.int32).tobytes()}] * 2
    write_mds(tmp_path / "old", {"input_ids": "bytes", "labels": "bytes"}, old)
    data = build(local=str(tmp_path / "old"), token_encoding_type="int32").dataset
    assert data.example(0)[0][:3].tolist() == [5, 6, 7]


def test_malformed_rows_of_shards_are_told_by_shard_and_row(build, tmp_path):
    rows = [{"prompt": f"Say {n}.".encode(), "response": b"\xff" if n == 2 else b"yes"} for n in range(4)]
    write_mds(tmp_path / "s", {"prompt": "bytes", "response": "bytes"}, rows)
    (bad,) = build(local=str(tmp_path / "s")).dataset.stores[0].report.first_dropped
    assert bad["reason"] == "invalid UTF-8"
    assert bad["place"].endswith("s/shard.00000.mds, row 2")

    write_mds(tmp_path / "j", {"messages": "json"}, [chat(number) for number in range(3)])
    shard = tmp_path / "j" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b'"Say 1."', b'#Say 1."'))
    (bad,) = build(local=str(tmp_path / "j")).dataset.stores[0].report.first_dropped
    assert bad["reason"] == "malformed row"
    assert bad["place"].endswith("j/shard.00000.mds, row 1")


def test_a_damaged_shard_is_an_error_that_names_it(build, tmp_path):
    folder = write_mds(tmp_path / "s", {"prompt": "str", "response": "str"}, pairs(5))
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"shard\.00000\.mds cannot be read: it has .* bytes, and the index says"):
        build(local=str(folder))
    assert shard.exists()


def test_remote_compressed_shards_and_a_damaged_copy(build, chat_tokenizer, tmp_path, caplog):
    columns = {"prompt": "str", "response": "str"}
    remote = write_mds(tmp_path / "remote", columns, pairs(5), compression="zstd", hashes=["xxh64"])
    (tmp_path / "local").mkdir()
    shutil.copy(remote / "index.json", tmp_path / "local")
    packed = (remote / "shard.00000.mds.zstd").read_bytes()
    (tmp_path / "local" / "shard.00000.mds.zstd").write_bytes(packed[:-3] + b"abc")
    loader = build(remote=str(remote), local=str(tmp_path / "local"))
    assert texts(loader, chat_tokenizer) == ANSWERS
    assert "Its cached copy is deleted and fetched again" in caplog.text
    assert (remote / "shard.00000.mds.zstd").read_bytes() == packed


def test_shards_that_are_not_there(build, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.streams\.a\.local: there is no folder"):
        build(streams={"a": {"local": str(tmp_path / "no")}})


def test_new_shards_make_a_new_store(build, chat_tokenizer, tmp_path):
    columns = {"prompt": "str", "response": "str"}
    folder = write_mds(tmp_path / "s", columns, pairs(5))
    assert len(texts(build(local=str(folder)), chat_tokenizer)) == 5
    shutil.rmtree(folder)
    write_mds(folder, columns, [{**row, "response": " no"} for row in pairs(5)])
    assert texts(build(local=str(folder)), chat_tokenizer) == [" no<|endoftext|>"] * 5


def test_a_mixture_of_kinds(build, chat_tokenizer, tmp_path):
    write_mds(tmp_path / "s", {"prompt": "str", "response": "str"}, pairs(5))
    path = write_rows(tmp_path / "x.jsonl", [{"messages": []}, chat(7, 0)])
    streams = {"shards": {"local": str(tmp_path / "s"), "repeat": 2}, "file": {"files": str(path), "choose": 3}}
    loader = build(streams=streams)
    assert texts(loader, chat_tokenizer) == [*ANSWERS, "7: done<|im_end|>"]
    assert loader.dataset.plan(0).examples.tolist() == [0, 1, 2, 3, 4] * 2 + [5] * 3
    assert [store.report.source for store in loader.dataset.stores] == [
        f"stream 'shards' ({tmp_path / 's'})",
        f"stream 'file' ({path})",
    ]
    assert count(loader).dropped == {"no turns": 1}
