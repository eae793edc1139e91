import hashlib
import io
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from streaming import MDSWriter

from llmtrain.data.inspect_command import inspect_command
from llmtrain.data.inspect_counts import Lengths
from llmtrain.data.verify import verify_command
from llmtrain.errors import UserError
from llmtrain.prep.mds import ShardWriter, TextShardWriter
from llmtrain.tokenizer import fingerprint, load_raw

SEQ = 16
ROWS = 100
EOS = 0


def write_shards(folder, rows, *, about=None, compression="zstd:1", hashes=("xxh64",), dtype=np.uint16, limit=1000):
    rows = np.asarray(rows, dtype)
    writer = ShardWriter(
        folder,
        seq_len=rows.shape[1],
        dtype=np.dtype(dtype),
        compression=compression,
        hashes=hashes,
        size_limit=limit,
        about=about,
    )
    writer.write(rows)
    writer.finish()
    return folder


@pytest.fixture
def ids():
    """Rows of ids 1 to 199, an EOS at every 13th place."""
    flat = np.random.default_rng(0).integers(1, 200, ROWS * SEQ)
    flat[12::13] = EOS
    return flat.reshape(ROWS, SEQ)


@pytest.fixture
def shards(tmp_path, ids):
    return write_shards(tmp_path / "out", ids)


def verify(*places):
    console = Console(file=io.StringIO(), width=80)
    return verify_command(places, console), console.file.getvalue()


def inspect(*places, **kwargs):
    console = Console(file=io.StringIO(), width=80)
    sound = inspect_command(places, console=console, **kwargs)
    return sound, console.file.getvalue(), json.loads((places[0] / "inspect.json").read_text())


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index["shards"])
    path.write_text(json.dumps(index))


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def test_whole_shards_are_ok(shards, tmp_path, ids):
    sound, said = verify(shards)
    assert sound
    assert "ok" in said
    assert f"{ROWS} rows" in said
    for compression in (None, "zstd:3"):
        assert verify(write_shards(tmp_path / str(compression), ids, compression=compression))[0]


@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_every_flipped_bit_is_found_and_named(tmp_path, ids, compression):
    folder = write_shards(tmp_path / "out", ids[:40], compression=compression, limit=1000)
    files = sorted(folder.glob("shard*"))
    assert len(files) > 1
    rng = np.random.default_rng(1)
    for place in rng.integers(0, files[1].stat().st_size, 60).tolist():
        flip(files[1], place)
        sound, said = verify(folder)
        assert not sound, place
        assert files[1].name in said
        assert files[0].name not in said
        flip(files[1], place)
    assert verify(folder)[0]


def test_without_hashes_a_damaged_structure_is_still_found(tmp_path, ids):
    folder = write_shards(tmp_path / "out", ids, compression=None, hashes=())
    sound, said = verify(folder)
    assert sound
    assert "no hashes" in said
    shard = sorted(folder.glob("shard*"))[0]
    flip(shard, 0)  # the number of rows
    assert "rows, the index says" in verify(folder)[1]
    flip(shard, 0)
    flip(shard, 9, 8)  # the offset of the second row
    assert "table of rows" in verify(folder)[1]


def test_truncated_missing_longer_and_extra_files_are_named(shards):
    first, second, third, *_ = sorted(shards.glob("shard*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-5])
    second.unlink()
    third.write_bytes(third.read_bytes() + b"x")
    (shards / "shard.00999.mds.zstd").write_bytes(whole)
    (shards / "README").write_text("nobody's business")
    sound, said = verify(shards)
    assert not sound
    lines = {line.split(": ", 1)[0].rpartition("/")[2]: line for line in said.splitlines() if line.startswith("  ")}
    assert len(lines) == 4
    assert f"truncated: {len(whole) - 5} of {len(whole)} bytes" in lines[first.name]
    assert "missing" in lines[second.name]
    assert "1 bytes longer" in lines[third.name]
    assert "not in the index" in lines["shard.00999.mds.zstd"]


def test_a_wrong_hash_in_the_index_is_told_from_a_changed_file(shards):
    edit_index(shards, lambda entries: entries[0]["zip_data"]["hashes"].update(xxh64="0" * 16))
    assert "the index lists a wrong hash" in verify(shards)[1]
    edit_index(shards, lambda entries: entries[1]["raw_data"]["hashes"].update(xxh64="0" * 16))
    said = verify(shards)[1]
    assert "decompresses to has another hash" in said
    assert said.count("the index is not") == 1


def test_one_of_two_hashes_wrong_is_the_indexs_fault(tmp_path, ids):
    folder = write_shards(tmp_path / "out", ids, compression=None, hashes=("sha256", "xxh64"))
    edit_index(folder, lambda entries: entries[0]["raw_data"]["hashes"].update(sha256="0" * 64))
    assert "lists a wrong hash of it: sha256" in verify(folder)[1]


def test_a_hash_that_nobody_can_compute_is_not_said_to_be_checked(tmp_path, ids):
    folder = write_shards(tmp_path / "out", ids, compression=None)
    edit_index(folder, lambda entries: [entry["raw_data"].update(hashes={"md99": "0"}) for entry in entries])
    sound, said = verify(folder)
    assert sound
    assert "md99" not in said
    assert "no hashes" in said


def test_what_decompresses_to_something_else_is_found_without_hashes(tmp_path, ids):
    folder = write_shards(tmp_path / "out", ids, hashes=())
    edit_index(folder, lambda entries: entries[0]["raw_data"].update(bytes=entries[0]["raw_data"]["bytes"] - 1))
    assert "decompresses to more than" in verify(folder)[1]


def test_an_index_that_disagrees_with_its_shards(shards, tmp_path, ids):
    edit_index(shards, lambda entries: entries[0].update(samples=entries[0]["samples"] + 1))
    assert "rows, the index says" in verify(shards)[1]
    other = write_shards(tmp_path / "other", ids)
    edit_index(other, lambda entries: entries[0].update(column_encodings=["ndarray:uint16:8"]))
    assert "header says column_encodings" in verify(other)[1]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', '{"shards": [{"version": 1}]}', '{"shards": 3}'])
def test_a_damaged_index_is_named(shards, content):
    (shards / "index.json").write_text(content)
    sound, said = verify(shards)
    assert not sound
    assert "index.json: " in said


def test_an_index_that_points_outside_is_refused(shards):
    edit_index(shards, lambda entries: entries[0]["raw_data"].update(basename="../../etc/passwd"))
    with pytest.raises(UserError, match="outside of its folder"):
        verify(shards)


def test_an_index_that_names_a_file_twice(shards):
    edit_index(shards, lambda entries: entries.append(entries[0]))
    assert "names a file twice" in verify(shards)[1]


def test_no_shards_at_all(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UserError, match="only folders on this machine"):
        verify(Path("s3://bucket/data"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no index\.json"):
        verify(tmp_path / "empty")


def test_a_lost_split_and_a_shortened_index_are_found_by_the_manifest(tmp_path, ids):
    out = tmp_path / "out"
    write_shards(out / "web" / "train", ids)
    write_shards(out / "web" / "val", ids[:20])
    splits = {"web/train": {"samples": ROWS}, "web/val": {"samples": 20}, "web/none": {"samples": 0}}
    (out / "prep.json").write_text(json.dumps({"splits": splits}))
    assert verify(out)[0]
    assert verify(out / "web" / "train")[0]
    edit_index(out / "web" / "train", lambda entries: entries.pop())
    last = sorted((out / "web" / "train").glob("shard*"))[-1]
    last.unlink()
    assert f"prep.json says {ROWS}" in verify(out / "web" / "train")[1]
    (out / "web" / "val" / "index.json").unlink()
    sound, said = verify(out)
    assert not sound
    assert "web/val/index.json: is missing; prep.json says 20 rows" in said


@pytest.mark.long
def test_streamings_own_shards_in_every_compression_and_encoding(tmp_path, ids):
    cases = [(compression, "ndarray:int32") for compression in (None, "gz", "bz2:1", "br:1", "zstd", "snappy")]
    for compression, encoding in [*cases, (None, "ndarray"), (None, f"ndarray:int32:{SEQ}"), (None, "bytes")]:
        folder = tmp_path / f"{compression}-{encoding.replace(':', '-')}"
        with MDSWriter(
            out=str(folder),
            columns={"tokens": encoding},
            compression=compression,
            hashes=["sha1", "xxh3_64"],
            size_limit=3000,
        ) as writer:
            for row in ids.astype(np.int64 if encoding == "bytes" else np.int32):
                writer.write({"tokens": row.tobytes() if encoding == "bytes" else row})
        sound, _, content = inspect(folder, samples=0)
        assert sound, folder
        assert verify(folder)[0]
        found = content["folders"][0]
        assert found["tokens"] == ROWS * SEQ
        assert {one["id"]: one["count"] for one in found["most_frequent"]}[EOS] == (ids == EOS).sum()
        shard = sorted(folder.glob("shard*"))[0]
        flip(shard, shard.stat().st_size // 2)
        assert shard.name in verify(folder)[1]


def test_rows_of_several_columns_and_lengths(tmp_path):
    rows = [[5, 6, 7], [1], [2, 3, 4, 5]]
    with MDSWriter(out=str(tmp_path / "out"), columns={"tokens": "ndarray:int32", "id": "int", "url": "str"}) as writer:
        for number, row in enumerate(rows):
            writer.write({"tokens": np.array(row, np.int32), "id": number, "url": "http://x" * number})
    _, _, content = inspect(tmp_path / "out")
    lengths = content["folders"][0]["lengths"]
    assert (lengths["of"], lengths["n"], lengths["least"], lengths["most"], lengths["total"]) == ("rows", 3, 1, 4, 8)


def test_counts_are_those_of_the_ids(shards, ids):
    _, said, content = inspect(shards)
    found = content["folders"][0]
    counts = np.bincount(ids.reshape(-1))
    share = counts[counts > 0] / counts.sum()
    assert (found["rows"], found["tokens"]) == (ROWS, ROWS * SEQ)
    assert found["ids_used"] == (counts > 0).sum()
    assert found["unigram_entropy_nats"] == pytest.approx(float(-(share * np.log(share)).sum()))
    assert found["bytes"] == sum(path.stat().st_size for path in shards.glob("shard*"))
    assert {one["id"]: one["count"] for one in found["most_frequent"]} == {
        int(token): int(counts[token]) for token in np.argsort(-counts, kind="stable")[:100]
    }
    assert "documents cannot be told apart" in said  # nobody said which id ends them
    assert found["damaged"] == []


def test_documents_are_told_by_their_end(tmp_path):
    lengths = [3, 40, 1, 1, 70, 13]  # across rows and shards; the last one does not end
    flat = np.concatenate([np.r_[np.full(n - 1, 7), EOS] for n in lengths[:-1]] + [np.full(lengths[-1], 7)])
    about = {"eos_token_id": EOS, "vocab_size": 200, "cut": "stream"}
    folder = write_shards(tmp_path / "out", flat.reshape(8, SEQ), about=about, limit=400)
    assert len(list(folder.glob("shard*"))) > 1
    _, said, content = inspect(folder)
    found = content["folders"][0]
    octaves = found["lengths"].pop("octaves")
    assert found["lengths"] == {
        "of": "documents",
        "unit": "tokens",
        "n": 5,
        "total": 115,
        "least": 1,
        "mean": 23.0,
        "p5": 1,
        "p25": 1,
        "p50": 3,
        "p75": 40,
        "p95": 70,
        "most": 70,
    }
    assert dict(zip(octaves["edges"], [*octaves["counts"], None], strict=True)) == {
        1: 2, 2: 1, 4: 0, 8: 0, 16: 0, 32: 1, 64: 1, 128: None
    }  # fmt: skip
    assert found["documents_cut"] == 1
    assert found["eos_share"] == pytest.approx(5 / 128)
    assert "5 documents of 1 to 70 tokens" in said


def test_a_document_does_not_go_on_across_a_damaged_shard(tmp_path):
    flat = np.full(SEQ * 30, 7)
    flat[[5, 400]] = EOS
    about = {"eos_token_id": EOS, "vocab_size": 200, "cut": "stream"}
    folder = write_shards(tmp_path / "out", flat.reshape(30, SEQ), about=about, limit=700)
    files = sorted(folder.glob("shard*"))
    assert len(files) >= 3
    flip(files[1], 30)
    sound, said, content = inspect(folder)
    assert not sound
    assert files[1].name in said
    assert content["folders"][0]["lengths"]["most"] < 395
    assert content["folders"][0]["documents_cut"] == 2


def test_partitions_do_not_run_into_each_other(tmp_path):
    """What fills no row at the end of a partition is not in the next one's first row."""
    about = {"eos_token_id": EOS, "vocab_size": 200, "cut": "stream"}
    folder = write_shards(tmp_path / "out", np.full((4, SEQ), 7), about=about, limit=10_000, compression=None)
    index = json.loads((folder / "index.json").read_text())
    data = (folder / "shard.00000.mds").read_bytes()
    (entry,) = index["shards"]
    index["shards"] = []
    for partition in range(2):
        name = f"shard.{partition:05}.00000.mds"
        (folder / name).write_bytes(data)
        index["shards"].append({**entry, "raw_data": {**entry["raw_data"], "basename": name}})
    (folder / "shard.00000.mds").unlink()
    (folder / "index.json").write_text(json.dumps(index))
    assert inspect(folder)[2]["folders"][0]["documents_cut"] == 2


def test_ids_outside_of_the_vocabulary_are_an_error_that_names_the_row(tmp_path, ids, tokenizer):
    size = max(load_raw(str(tokenizer)).get_vocab(with_added_tokens=True).values()) + 1
    ids[37, 5] = size
    folder = write_shards(tmp_path / "out", ids)
    entries = json.loads((folder / "index.json").read_text())["shards"]
    row = 37 - sum(entry["samples"] for entry in entries[:1])
    assert 0 < row < entries[1]["samples"]
    with pytest.raises(UserError, match=rf"shard\.00001\.mds\.zstd, row {row}: token id {size} is outside"):
        inspect(folder, tokenizer=str(tokenizer))
    assert inspect(folder)[0]  # nobody says what the vocabulary is


def test_bytes_of_another_dtype_are_refused_with_the_option(tmp_path, ids):
    with MDSWriter(out=str(tmp_path / "out"), columns={"tokens": "bytes"}) as writer:
        for row in ids:
            writer.write({"tokens": row.astype(np.uint16).tobytes()})
    with pytest.raises(UserError, match="--token-encoding-type"):
        inspect(tmp_path / "out")
    assert inspect(tmp_path / "out", token_encoding_type="uint16")[2]["folders"][0]["tokens"] == ROWS * SEQ
    with pytest.raises(UserError, match="ids are integers"):
        inspect(tmp_path / "out", token_encoding_type="float32")


def test_shards_of_another_tokenizer_are_refused(tmp_path, ids, tokenizer):
    mine = write_shards(tmp_path / "mine", ids, about={"tokenizer_fingerprint": fingerprint(str(tokenizer))})
    theirs = write_shards(tmp_path / "theirs", ids, about={"tokenizer_fingerprint": "0123456789abcdef"})
    inspect(mine, tokenizer=str(tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        inspect(theirs, tokenizer=str(tokenizer))


def test_samples_are_decoded_with_special_tokens_and_without_control_characters(tmp_path, tokenizer):
    raw = load_raw(str(tokenizer))
    eos = raw.token_to_id("<|endoftext|>")
    text = raw.encode("the quick\x1b[31m fox", add_special_tokens=False).ids
    row = ([*text, eos] * 8)[: 2 * SEQ]
    folder = write_shards(tmp_path / "out", [row])
    _, said, content = inspect(folder, tokenizer=str(tokenizer), samples=1)
    assert r"the quick\x1b[31m fox<|endoftext|>the quick" in said
    assert "\x1b" not in said
    assert content["folders"][0]["eos_token_id"] == eos
    assert content["folders"][0]["lengths"]["of"] == "documents"
    assert said.count("first") == 0
    assert "first 3 of 32 tokens" in inspect(folder, tokenizer=str(tokenizer), samples=1, sample_tokens=3)[1]


def test_samples_are_the_same_each_time_and_spread_over_shards(shards):
    said = [inspect(shards, samples=5)[1] for _ in range(2)]
    titles = [[line for line in one.splitlines() if line.startswith("---")] for one in said]
    assert titles[0] == titles[1]
    assert len(titles[0]) == 5
    assert len({title.split(",")[1] for title in titles[0]}) > 1


def test_several_folders_at_once_from_a_manifest(tmp_path, corpus):
    out = corpus.train.parent
    console = Console(file=io.StringIO(), width=80)
    assert inspect_command([out], output=tmp_path / "seen", samples=1, console=console)
    said, content = console.file.getvalue(), json.loads((tmp_path / "seen.json").read_text())
    assert [found["folder"] for found in content["folders"]] == [str(corpus.train), str(corpus.val)]
    val = content["folders"][1]
    assert val["unigram_entropy_nats"] == pytest.approx(corpus.val_unigram_entropy)
    made = json.loads((out / "prep.json").read_text())
    assert val["rows"] == made["splits"]["val"]["samples"]
    assert content["folders"][0]["vocab_size"] == corpus.vocab_size
    assert "source python-reference: {stdlib}/pydoc_data/topics.py" in said
    assert "all together" in said
    lines = [line.split() for line in said.splitlines() if line.startswith(("train  ", "val  "))]
    assert [line[4] for line in lines] == [f"{found['tokens']:,}" for found in content["folders"]]  # not cut off
    # as many documents as went in, but the one at the end of each split
    for found, split in zip(content["folders"], ("train", "val"), strict=True):
        assert 0 <= made["splits"][split]["documents"] - found["lengths"]["n"] <= 1 + found["documents_cut"]
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.size[0] > 800
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


def test_conversations(tmp_path):
    folder = tmp_path / "out"
    turns = [{"role": "user", "content": "Wie spät ist es?"}, {"role": "assistant", "content": "Gleich zwölf."}]
    with TextShardWriter(folder, columns={"messages": "json"}) as writer:
        for _ in range(3):
            writer.write({"messages": turns})
    sound, said, content = inspect(folder, samples=1)
    assert sound
    assert "user: Wie spät ist es?" in said
    assert "assistant: Gleich zwölf." in said
    lengths = content["folders"][0]["lengths"]
    assert lengths["unit"] == "bytes"
    assert lengths["most"] == len("Wie spät ist es?Gleich zwölf.".encode())
    assert (folder / "inspect.png").stat().st_size > 1000
    flip(folder / "shard.00000.mds.zstd", 60)
    assert not inspect(folder)[0]


def test_an_output_that_cannot_be_written_is_named(tmp_path, shards):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        inspect(shards, output=tmp_path / "file" / "below")


def test_memory_is_that_of_one_shard(tmp_path):
    rows = np.zeros((12_000, 512), np.uint16)
    folder = write_shards(tmp_path / "out", rows, limit=2 << 20)
    del rows
    assert len(list(folder.glob("shard*"))) >= 6
    tracemalloc.start()
    assert verify(folder)[0]
    peak = tracemalloc.get_traced_memory()[1]
    assert peak < 2.5 * (2 << 20)
    tracemalloc.reset_peak()
    assert inspect(folder, samples=2)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (2 << 20)  # ids as int64 for bincount, once


def test_lengths_have_exact_moments_and_quantiles_within_a_percent():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(6, 2, 20_000)).astype(np.int64) + 1
    lengths = Lengths()
    for part in np.array_split(values, 7):
        lengths.add(part)
    assert (lengths.n, lengths.total) == (len(values), values.sum())
    assert (lengths.least, lengths.most) == (values.min(), values.max())
    for share in (0.05, 0.5, 0.95):
        assert lengths.quantile(share) == pytest.approx(np.quantile(values, share), rel=0.01)
    edges, counts = lengths.histogram(1)
    assert all(edge == 2 ** round(math.log2(edge)) for edge in edges)
    assert counts == np.histogram(values, edges)[0].tolist()
    assert sum(lengths.histogram(4).counts) == len(values)


def run(*arguments):
    code = f"import sys; sys.argv = {['llmtrain', *map(str, arguments)]!r}; from llmtrain.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)


def test_the_commands_exit_codes_and_light_imports(shards, tmp_path):
    whole = run("data", "verify", shards)
    assert (whole.returncode, whole.stderr) == (0, "")
    flip(sorted(shards.glob("shard*"))[2], 40)
    damaged = run("data", "verify", shards)
    assert damaged.returncode == 1
    assert "shard.00002.mds.zstd" in damaged.stdout
    assert run("data", "inspect", shards, "--output", tmp_path / "x").returncode == 1  # takes seconds: matplotlib
    nowhere = run("data", "verify", tmp_path / "nowhere")
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("error: ")
    light = (
        "import sys, pathlib; from llmtrain.data.verify import verify_command;"
        "from llmtrain.data.inspect_command import inspect_command;"
        f"inspect_command([pathlib.Path({str(shards)!r})], output=pathlib.Path({str(tmp_path / 'y')!r}));"
        "print([name for name in ('torch', 'streaming', 'composer', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_inspecting_changes_no_shard(shards):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}
    inspect(shards)
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards.iterdir()}
    assert {name: digest for name, digest in after.items() if not name.startswith("inspect")} == before
    assert verify(shards)[0]  # the picture beside them is no damage
