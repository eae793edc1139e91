"""Names in archives, indexes and manifests of others: none leads out of its folder, by its text or by a link."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from streaming.base.world import World

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.fetch import _named_in
from llmtrain.checkpoint.tokenizer_files import _refuse_foreign_link
from llmtrain.checkpoint.weights_files import open_tensors
from llmtrain.data.guarded_streaming import GuardedStream
from llmtrain.data.mds_files import Damage, read_index, unpack
from llmtrain.data.shards import check_names, check_size
from llmtrain.errors import UserError
from llmtrain.inside import leads_outside, why_outside
from llmtrain.json_text import parse_json

OUTSIDE = {
    "climbs": "../x",
    "climbs inside": "a/../../x",
    "absolute": "/etc/passwd",
    "backslash": "..\\x",
    "drive": "C:\\x",
    "root": "\\x",
    "NUL": "a\0b",
    "empty": "",
    "itself": ".",
    "itself twice": "././",
    "long": "a" * 300,
    "deep": "a/" * 600 + "b",
}


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_names_that_lead_outside_are_refused_everywhere(name: str, tmp_path: Path) -> None:
    assert why_outside(name)
    with pytest.raises(UserError, match="outside of its folder"):
        check_names([name], "data")
    entry = {"size": 1, "xxh128": "0"}
    body = {"format": 1, "kind": "full", "step": 1, "tokens": 1, "files": {name: entry}, "recipe": {}}
    body["checksum"] = manifest._checksum(body)
    (tmp_path / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(manifest.ManifestError, match="is no name of a file inside the checkpoint"):
        manifest.read(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (lambda: _named_in(index), lambda: open_tensors(tmp_path)):
        with pytest.raises(UserError):
            read()
    shard = {"version": 2, "format": "mds", "samples": 1, "compression": None, "hashes": [], "size_limit": 9}
    shard |= {"column_names": ["tokens"], "column_encodings": ["bytes"], "column_sizes": [None]}
    shard |= {"raw_data": {"basename": name, "bytes": 99, "hashes": {}}, "zip_data": None}
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    with pytest.raises((UserError, Damage), match=r"outside of its folder|at least 1 character"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["a", "a/b.mds", "__0_0.distcp", ".metadata", "a..b", "ä ö"])
def test_good_names(name: str) -> None:
    assert why_outside(name) is None
    check_names([name], "data")


def test_a_link_in_a_checkpoint_has_to_lead_to_what_the_manifest_says(tmp_path: Path) -> None:
    """Stores by hash keep files as links: the content is known, or it is damage. Nobody knows a private file's hash."""
    (tmp_path / "private").write_text("secret")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("full.pt", "own"):
        (checkpoint / name).write_text("public")
    (checkpoint / "alias").symlink_to("own")
    names = ("full.pt", "own", "alias")
    files = {name: manifest.file_entry(checkpoint / name) for name in names}
    manifest.write(checkpoint, kind="full", step=1, tokens=1, files=files, recipe={}, tokenizer_fingerprint=None)
    assert manifest.verify(checkpoint) == []
    (checkpoint / "full.pt").unlink()
    (checkpoint / "full.pt").symlink_to(tmp_path / "private")
    (problem,) = manifest.verify(checkpoint)
    assert "full.pt: hash differs" in problem
    (tmp_path / "latest").symlink_to(checkpoint)
    assert not leads_outside(tmp_path / "latest", "alias")


def test_a_folder_that_is_a_link_leads_outside_too(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "file").write_text("secret")
    folder = tmp_path / "folder"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "file").write_text("public")
    (folder / "theirs").symlink_to(tmp_path / "private")
    assert leads_outside(folder, "theirs/file")
    assert not leads_outside(folder, "own/file")
    assert not leads_outside(folder, "own/absent")


def test_a_private_file_does_not_get_into_an_export_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"vocab\.json: is a link to"):
        _refuse_foreign_link(tokenizer, "vocab.json")
    snapshot = tmp_path / "models--a" / "snapshots" / "1"  # as in the hub's cache
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a" / "blobs").mkdir()
    (tmp_path / "models--a" / "blobs" / "f").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../blobs/f")
    _refuse_foreign_link(snapshot, "vocab.json")


@pytest.mark.parametrize(("samples", "size"), [(10**18, 100), (26, 100), (-1, 100), (1, 2**40), (1, -5), ("9", 100)])
def test_indexes_that_promise_the_impossible(samples: object, size: int) -> None:
    with pytest.raises(UserError, match="which no shard can have"):
        check_size("shard", samples, size, "data")  # type: ignore[arg-type]
    check_size("shard", 25, 100, "data")


@pytest.mark.parametrize("samples", [10**15, -1])
def test_shards_of_other_formats_cannot_promise_it_either(samples: int, tmp_path: Path) -> None:
    file = {"basename": "a.json", "bytes": 100, "hashes": {}}
    shard = {"version": 2, "format": "json", "columns": {"tokens": "str"}, "compression": None, "hashes": []}
    shard |= {"newline": "\n", "raw_data": file, "raw_meta": {**file, "basename": "a.json.meta"}, "samples": samples}
    shard |= {"size_limit": None, "zip_data": None, "zip_meta": None}
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    stream = GuardedStream(local=str(tmp_path), split="")
    with pytest.raises(UserError, match="which no shard can have"):
        stream.get_shards(World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0), False)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": [{**shard, "samples": 9}]}))
    with pytest.raises(UserError, match="no column 'tokens'"):
        stream.get_shards(World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0), False)


@pytest.mark.parametrize("compression", ["zstd:3", "gz:9"])
def test_a_shard_that_unfolds_to_too_much_is_a_message_and_no_memory(compression: str, tmp_path: Path) -> None:
    zeros = bytes(50_000_000)
    bomb = zstandard.compress(zeros) if compression.startswith("zstd") else gzip.compress(zeros)
    assert len(bomb) < 100_000
    assert len(unpack(bomb, compression, 1000)) == 1001
    stream = GuardedStream(remote=str(tmp_path / "r"), local=str(tmp_path), split="", keep_zip=False)
    stream.validate_hash = None
    stream.safe_keep_zip = False
    stream._sizes["s.mds"] = 1000
    (tmp_path / "s.mds.z").write_bytes(bomb)
    with pytest.raises(ValueError, match="does not unfold to the 1,000 bytes"):
        stream._decompress_shard_part(
            SimpleNamespace(hashes={}), str(tmp_path / "s.mds.z"), str(tmp_path / "s.mds"), compression
        )
    assert not (tmp_path / "s.mds").exists()


def test_deep_json_is_a_mistake_like_any_other(tmp_path: Path) -> None:
    assert parse_json('{"a": [1]}') == {"a": [1]}
    deep = "[" * 200_000
    with pytest.raises(ValueError, match="too deep"):
        parse_json(deep)
    (tmp_path / "manifest.json").write_text(deep)
    with pytest.raises(manifest.ManifestError, match="too deep"):
        manifest.read(tmp_path)
