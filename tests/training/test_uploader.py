"""Checkpoints on their way to a store and back: what arrives, what is given up, what is refused."""

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest

from llmtrain.checkpoint import manifest, remote_upload
from llmtrain.checkpoint.best import Best, write_best
from llmtrain.checkpoint.remote import SET_ASIDE, UNFINISHED, RemoteFolder
from llmtrain.checkpoint.remote_download import download
from llmtrain.checkpoint.remote_upload import upload
from llmtrain.checkpoint.retention import Retention
from llmtrain.errors import UserError
from llmtrain.prep.stores import open as stores
from llmtrain.testing.remote import CuttingProxy, sftp_server
from llmtrain.training import skipped_steps
from llmtrain.training import uploader as module
from llmtrain.training.remote_start import fetch_skipped_steps
from llmtrain.training.uploader import Uploader


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(stores, "_opened", {})  # the environment names another endpoint in each test


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RemoteFolder, Any, CuttingProxy]]:
    """A folder in a bucket behind a proxy, and a client that sees everything."""
    for key, value in (
        ("AWS_ACCESS_KEY_ID", "me"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=s3)
    name = f"bucket-{random.getrandbits(40):x}"
    client.create_bucket(Bucket=name)
    with CuttingProxy(int(s3.rpartition(":")[2]), every=0, after=0) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
        yield RemoteFolder(f"s3://{name}/runs/x"), Bucket(client, name), proxy


class Bucket:
    """What lies in it, by names relative to the run's folder."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [one["Key"].removeprefix("runs/x/") for one in found]

    def files(self) -> dict[str, bytes]:
        return {
            name: self.client.get_object(Bucket=self.name, Key=f"runs/x/{name}")["Body"].read() for name in self.names()
        }

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"runs/x/{name}", Body=content)

    def complete(self) -> set[str]:
        return {name.partition("/")[0] for name in self.names() if name.endswith("/manifest.json")}


def checkpoint(folder: Path, step: int, content: bytes = b"", size: int = 5000) -> Path:
    """One that looks sharded, of random bytes."""
    path = folder / f"ep0-ba{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / manifest.MANIFEST).unlink(missing_ok=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (path / name).write_bytes(content or random.randbytes(size))
    manifest.write(
        path,
        kind="sharded",
        step=step,
        tokens=step * 10,
        files={file.name: manifest.file_entry(file) for file in path.iterdir()},
        recipe={},
        tokenizer_fingerprint=None,
    )
    return path


@pytest.fixture
def uploads() -> Iterator[Callable[..., tuple[Uploader, list[str]]]]:
    made: list[Uploader] = []

    def make(remote: RemoteFolder, folder: Path, keep: int = -1, **options: Any) -> tuple[Uploader, list[str]]:
        lines: list[str] = []
        one = Uploader(remote, folder, Retention(keep, options.pop("every", None)), say=lines.append, **options)
        made.append(one)
        return one, lines

    yield make
    for one in made:
        one.stop()


def eventually(happens: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_saved_arrives_and_comes_back(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, lines = uploads(remote, tmp_path / "here")
    one.start()
    for step in (4, 8):
        one.published(checkpoint(tmp_path / "here", step))
        assert one.wait()
    assert there.complete() == {"ep0-ba4", "ep0-ba8"}
    assert not any(UNFINISHED in name for name in there.files())
    assert json.loads(there.files()["latest.json"])["checkpoint"] == "ep0-ba8"
    assert "ep0-ba4 -> s3://" in lines[0]
    assert "sizes and hashes compared" in lines[0]
    newest = remote.checkpoints()[0]
    counted: list[int] = []
    assert download(remote, newest, tmp_path / "new", counted.append) == []
    assert manifest.verify(tmp_path / "new/ep0-ba8") == []
    assert sum(counted) == 15000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ep0-ba8"]


def test_the_manifest_is_last_and_a_cut_off_one_is_no_checkpoint(bucket: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    path = checkpoint(tmp_path, 4)
    order: list[str] = []
    put = remote.store.put
    remote.store.put = lambda name, *rest: (order.append(name.rpartition("/")[2]), put(name, *rest))[1]
    try:
        upload(remote, path, lambda name, n: None, {})
    finally:
        del remote.store.put
    assert order[0] == UNFINISHED
    assert order[-1] == manifest.MANIFEST
    there.put(f"ep0-ba8/{UNFINISHED}", b"")
    there.put("ep0-ba8/__0_0.distcp", b"half")
    half, whole = remote.checkpoints()
    assert (half.name, half.was_cut_off, half.is_offered) == ("ep0-ba8", True, False)
    assert (whole.name, whole.is_offered) == ("ep0-ba4", True)


def test_a_store_that_goes_away_is_told_once_and_nothing_is_lost(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, proxy = bucket
    one, lines = uploads(remote, tmp_path, keep=1)
    one.start()
    eventually(lambda: one._looked)
    proxy.down()
    paths = [checkpoint(tmp_path, step) for step in (4, 8, 12)]
    for path in paths:
        one.published(path)
    eventually(lambda: one._failures >= 4)
    assert not any(one.may_delete(path) for path in paths)
    fails = [line for line in lines if "fails" in line]
    assert len(fails) == 1
    assert "Training goes on" in fails[0]
    assert "Next attempt in" in fails[0]
    proxy.every = 0
    eventually(lambda: "ep0-ba12" in there.complete())
    eventually(lambda: any("works again" in line for line in lines))
    eventually(lambda: one.may_delete(paths[2]))
    one.may_delete(paths[0])
    one.may_delete(paths[1])
    assert one.wait()
    assert "ep0-ba12" in there.complete()


def test_what_waits_gives_way_when_a_newer_one_has_arrived(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, lines = uploads(remote, tmp_path, keep=1)
    old, new = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    for path in (old, new):
        one.published(path)
    one._looked = True
    one._send_newest()
    assert there.complete() == {"ep0-ba8"}  # the newest first
    assert one.may_delete(old)
    assert "ep0-ba4 is not sent any more: ep0-ba8 has arrived" in lines[-1]
    assert one.missing() == []


def test_what_waits_gives_way_when_the_disk_has_no_room(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, _, _ = bucket
    one, lines = uploads(remote, tmp_path, keep=1)  # not started: the store does not answer
    old, new = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    for path in (old, new):
        one.published(path)
    assert not one.may_delete(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        one._sending = old.name
        assert not one.may_delete(old)
        one._sending = None
        assert one.may_delete(old)
    assert "ep0-ba4 is not sent any more: the disk has no room" in lines[-1]
    assert one.missing() == ["ep0-ba8"]


def test_another_run_that_writes_to_the_same_place_is_told(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, _, _ = bucket
    ahead, _ = uploads(remote, tmp_path / "a")
    behind, lines = uploads(remote, tmp_path / "b")
    for one in (behind, ahead):
        one.start()
        eventually(lambda one=one: one._looked)
    ahead.published(checkpoint(tmp_path / "a", 12))
    assert ahead.wait()
    for step in (4, 8):
        behind.published(checkpoint(tmp_path / "b", step))
        assert behind.wait()
    told = [line for line in lines if "another run writes there" in line]
    assert len(told) == 1
    assert "ep0-ba12" in told[0]


def test_retention_in_the_store(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, _ = uploads(remote, tmp_path, keep=2, every="10ba")
    one.start()
    there.put("other-file", b"x")
    for step in range(4, 33, 4):
        one.published(checkpoint(tmp_path, step))
        assert one.wait()
        if step == 8:
            record = Best(checkpoint="ep0-ba8", step=8, monitor="loss", dataloader_label="eval", value=1.0)
            write_best(tmp_path, record, tmp_path / ".saving")
    assert there.complete() == {"ep0-ba8", "ep0-ba12", "ep0-ba20", "ep0-ba28", "ep0-ba32"}
    assert remote.best().checkpoint == "ep0-ba8"
    assert "other-file" in there.files()
    assert {name.partition("/")[0] for name in there.files() if "/" in name} == there.complete()


def test_a_new_start_sends_what_is_missing_and_nothing_twice(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    for step in (4, 8):
        checkpoint(tmp_path, step)
    first, _ = uploads(remote, tmp_path)
    first.start()
    assert first.wait()
    checkpoint(tmp_path, 12)
    there.put(f"ep0-ba6/{UNFINISHED}", b"")  # cut off, and nobody has the rest
    there.put("ep0-ba6/x", b"half")
    there.put("ep0-ba7/__0_0.distcp", b"somebody's")
    again, lines = uploads(remote, tmp_path, begins=(12, 0))
    again.start()
    assert again.wait()
    assert [line.split()[1] for line in lines] == ["ep0-ba12"]
    assert there.complete() == {"ep0-ba4", "ep0-ba8", "ep0-ba12"}
    names = {name.partition("/")[0] for name in there.files()}
    assert "ep0-ba6" not in names
    assert "ep0-ba7" in names  # no marker: not ours to delete


def test_one_that_is_replaced_is_never_half_old_and_half_new(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, _ = uploads(remote, tmp_path / "a")
    one.start()
    one.published(checkpoint(tmp_path / "a", 4))
    assert one.wait()
    path = checkpoint(tmp_path / "b", 4)
    other, _ = uploads(remote, tmp_path / "b", replaces=["ep0-ba4", "ep0-ba99"])
    other.start()
    other.published(path)
    assert other.wait()
    assert there.files()["ep0-ba4/manifest.json"] == (path / "manifest.json").read_bytes()
    assert download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "new") == []


def damaged(uploads: Any, remote: Any, folder: Path) -> tuple[Any, list[str]]:
    """Uploads that have come to a checkpoint whose last file is damaged, and what they have said."""
    one, lines = uploads(remote, folder)
    one.start()
    path = checkpoint(folder, 4)
    (path / "__1_0.distcp").write_bytes(b"x" * 5000)
    one.published(path)
    assert one.wait()
    return one, lines


def test_a_checkpoint_that_is_damaged_on_the_disk_is_not_sent(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    _, lines = damaged(uploads, remote, tmp_path)
    assert there.complete() == set()
    assert "ep0-ba4 is not sent: ep0-ba4/__1_0.distcp: hash differs" in lines[0]


def test_one_that_is_written_anew_takes_no_file_from_the_one_before(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, lines = damaged(uploads, remote, tmp_path)  # the first files have been sent, the last one is damaged
    assert "ep0-ba4/.metadata" in there.files()
    same_content = remote_upload.same_content
    try:
        remote_upload.same_content = lambda *_: False  # a store that tells no hashes
        one.published(checkpoint(tmp_path, 4))
        assert one.wait()
    finally:
        remote_upload.same_content = same_content
    assert not [line for line in lines if "fails" in line]
    assert download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "new") == []


def test_a_checkpoint_that_is_exchanged_while_it_is_sent_is_not_finished(bucket: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    path = checkpoint(tmp_path, 4, content=b"old" * 100)

    def exchange(name: str, n: int) -> None:
        if name == "__1_0.distcp":
            checkpoint(tmp_path, 4, content=b"new" * 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_upload, "arrived", lambda *_: ([], False))  # a store that tells no hashes
        with pytest.raises(ConnectionError, match="written anew"):
            upload(remote, path, exchange, {})
    assert there.complete() == set()


def test_damage_in_the_store_is_named(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, _ = uploads(remote, tmp_path / "here")
    one.start()
    one.published(checkpoint(tmp_path / "here", 4, content=b"abc" * 100))
    assert one.wait()
    good = there.files()

    def problem() -> str:
        return " ".join(download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "new"))

    there.put("ep0-ba4/__0_0.distcp", b"abd" * 100)
    assert "__0_0.distcp: hash differs" in problem()
    there.put("ep0-ba4/__0_0.distcp", b"abc")
    assert "__0_0.distcp: 3 bytes instead of 300" in problem()
    there.client.delete_object(Bucket=there.name, Key="runs/x/ep0-ba4/__0_0.distcp")
    assert "__0_0.distcp: missing" in problem()
    there.put("ep0-ba4/manifest.json", good["ep0-ba4/manifest.json"][:-20])
    assert "manifest.json: cannot be read" in problem()
    there.put("ep0-ba4/manifest.json", b" " * 200)
    assert "manifest.json" in problem()
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "./manifest.json", "manifest.json/x"])
def test_a_manifest_names_no_file_outside(bucket: Any, tmp_path: Path, name: str) -> None:
    remote, there, _ = bucket
    entry = {"size": 4, "xxh128": "0" * 32}
    body = {
        "format": 1,
        "kind": "sharded",
        "step": 4,
        "tokens": 0,
        "files": {".metadata": entry, name: entry},
        "recipe": {},
    }
    body["checksum"] = manifest._checksum(body)
    there.put("ep0-ba4/manifest.json", json.dumps(body).encode())
    there.put("ep0-ba4/.metadata", b"evil")
    there.put(f"ep0-ba4/{name}", b"evil")
    problems = download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "deep/er/new")
    assert "is no name of a file inside the checkpoint" in problems[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_manifest_that_is_too_large_is_not_read(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, there, _ = bucket
    monkeypatch.setattr("llmtrain.checkpoint.remote_download.LARGEST_MANIFEST", 100)
    there.put("ep0-ba4/manifest.json", b" " * 101)
    assert "no more than 100 are expected" in download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "new")[0]


def test_a_download_that_was_cut_off_goes_on(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, _, _ = bucket
    one, _ = uploads(remote, tmp_path / "here")
    one.start()
    path = checkpoint(tmp_path / "here", 4)
    one.published(path)
    assert one.wait()
    left, stale = tmp_path / "new/.downloading-ep0-ba4", tmp_path / "new/.downloading-ep0-ba2"
    for folder in (left, stale):
        folder.mkdir(parents=True)
    (left / ".metadata").write_bytes((path / ".metadata").read_bytes())
    (left / "__0_0.distcp").write_bytes(b"torn")
    read: list[str] = []
    whole = remote.store.read
    remote.store.read = lambda file, *rest: (read.append(file.path.rpartition("/")[2]), whole(file, *rest))[1]
    try:
        assert download(remote, remote.checkpoint("ep0-ba4"), tmp_path / "new") == []
    finally:
        del remote.store.read
    assert set(read) == {"manifest.json", "__0_0.distcp", "__1_0.distcp"}
    assert manifest.verify(tmp_path / "new/ep0-ba4") == []
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["ep0-ba4"]


def test_several_processes_that_fetch_to_one_folder_do_not_disturb_each_other(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, _, _ = bucket
    upload(remote, checkpoint(tmp_path / "here", 4, size=50_000), lambda name, n: None, {})
    there, read = remote.checkpoint("ep0-ba4"), remote.store.read

    def slowly(*arguments: Any) -> bytes:
        time.sleep(0.05)
        return read(*arguments)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(remote.store, "read", slowly, raising=False)
        found = list(pool.map(lambda _: download(remote, there, tmp_path / "new"), range(3)))
    assert found == [[], [], []]
    assert manifest.verify(tmp_path / "new/ep0-ba4") == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ep0-ba4"]
    assert capsys.readouterr().err.count("waits for another process") == 2


def test_the_longer_list_of_left_out_steps_counts(bucket: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    values = {"reason": "x", "first": 5, "last": 6, "found_at": 6, "checkpoint": "ep0-ba4", "step": 4, "when": ""}
    one = skipped_steps.RewindRecord.model_validate({**values, "done": True})
    other = one.model_copy(update={"first": 9, "last": 9})
    skipped_steps.write(tmp_path / "elsewhere", [one, other])
    there.put("skipped_steps.json", (tmp_path / "elsewhere/skipped_steps.json").read_bytes())
    skipped_steps.write(tmp_path / "run", [one])
    fetch_skipped_steps(remote, tmp_path / "run")
    assert skipped_steps.read(tmp_path / "run") == [one, other]
    skipped_steps.write(tmp_path / "run", [one, other, other])
    fetch_skipped_steps(remote, tmp_path / "run")
    assert len(skipped_steps.read(tmp_path / "run")) == 3
    there.put("skipped_steps.json", b"[1, 2")
    with pytest.raises(UserError, match=r"/runs/x/skipped_steps\.json cannot be read"):
        fetch_skipped_steps(remote, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_was_set_aside_is_not_offered_until_it_is_written_anew(bucket: Any, uploads: Any, tmp_path: Path) -> None:
    remote, there, _ = bucket
    one, _ = uploads(remote, tmp_path)
    one.start()
    one.published(checkpoint(tmp_path, 8))
    assert one.wait()
    there.put(f"ep0-ba8/{SET_ASIDE}", b"")
    assert not remote.checkpoint("ep0-ba8").is_offered
    again, _ = uploads(remote, tmp_path, begins=(4, 0))
    again.start()
    eventually(lambda: again._looked)
    again.published(checkpoint(tmp_path, 8))
    assert again.wait()
    assert remote.checkpoint("ep0-ba8").is_offered


def test_an_end_that_cannot_be_reached_is_given_up(
    bucket: Any, uploads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, _, proxy = bucket
    monkeypatch.setenv("LLMTRAIN_STORAGE_ATTEMPTS", "3")
    proxy.every, proxy.after = 1, 1
    one, _ = uploads(remote, tmp_path)
    one.start()
    one.published(checkpoint(tmp_path, 4))
    assert not one.wait()
    assert one.missing() == ["ep0-ba4"]
    end = time.monotonic() + 0.3
    assert not one.wait(lambda: end)
    assert time.monotonic() - end < 0.5


def test_sftp(uploads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sftp_server(tmp_path / "server") as server:
        (tmp_path / "server").mkdir()
        (tmp_path / "known_hosts").write_text(server.known_at(server.port))
        monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(tmp_path / "known_hosts"))
        remote = RemoteFolder(f"sftp://me:s3cret@127.0.0.1:{server.port}/runs/x")
        remote.try_out()
        assert remote.checkpoints() == []
        one, lines = uploads(remote, tmp_path / "here", keep=1)
        one.start()
        for step in (4, 8):
            one.published(checkpoint(tmp_path / "here", step, size=700_000))
            assert one.wait()
        assert [found.name for found in remote.checkpoints()] == ["ep0-ba8"]
        assert sorted(path.name for path in (tmp_path / "server/runs/x").iterdir()) == ["ep0-ba8", "latest.json"]
        assert download(remote, remote.checkpoint("ep0-ba8"), tmp_path / "new") == []
        assert "s3cret" not in " ".join(lines)
        assert "s3cret" not in str(remote)
        one.stop()
        remote.store._disconnect()  # type: ignore[attr-defined]


def test_a_url_of_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf:// is not supported"):
        RemoteFolder("hf://me/model")
