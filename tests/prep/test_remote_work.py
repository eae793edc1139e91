"""Output on storage without rename and locks, over real protocols; killed and cut off while it is written."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
import yaml

from llmtrain.errors import UserError
from llmtrain.prep import remote_lock, storage
from llmtrain.prep.remote_work import RemoteWork
from llmtrain.prep.scratch import scratch_folder
from llmtrain.prep.stores import retry
from llmtrain.prep.stores.open import open_store
from llmtrain.testing.remote import CuttingProxy, sftp_server


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("llmtrain.prep.stores.open._opened", {})
    monkeypatch.setattr("llmtrain.prep.remote_work._downloaded", {})


@pytest.fixture
def bucket(s3, monkeypatch):
    """An empty bucket, as a URL."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    name = f"bucket-{random.getrandbits(40):x}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def sftp(tmp_path, monkeypatch):
    """An empty folder of a server, as a URL."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("COMPOSER_SFTP_KNOWN_HOSTS_FILE", str(tmp_path / "known_hosts"))
    with sftp_server(tmp_path / "server") as server:
        (tmp_path / "known_hosts").write_text(server.known_at(server.port))
        yield f"sftp://me:s3cret@127.0.0.1:{server.port}/home"


@pytest.fixture(params=["bucket", "sftp"])
def out(request):
    """URL for an output."""
    return f"{request.getfixturevalue(request.param)}/corpora/books"


def content(url):
    """Name -> digest, of all files below."""
    return {name: hashlib.sha256(storage.read_bytes(f"{url}/{name}")).hexdigest() for name in storage.names_below(url)}


def put(url, data):
    store, _, path = open_store(url)
    store.put(path, data)


def commit(work, places, marker):
    with work.temporary() as folder:
        files = {place: folder / str(i) for i, place in enumerate(places)}
        for place, file in files.items():
            file.write_bytes(place.encode() * 100)
        work.commit(files, marker, b"{}")


def test_working_files_are_there_for_everybody(out):
    work, other = RemoteWork(out), RemoteWork(out + "/")
    assert work.read("plan.json") is None
    assert work.names("done") == set()
    work.write("plan.json", b"1")
    work.write("plan.json", b"2")
    work.write("done/a/1.json", b"x")
    work.write("done/2.json", b"")
    assert other.read("plan.json") == b"2"
    assert other.read("done/2.json") == b""
    assert other.names("done") == {"2.json"}
    assert other.names("done/a") == {"1.json"}


def test_output_is_published_and_nothing_else_is_left(out):
    work = RemoteWork(out)
    work.write("plan.json", b"{}")
    commit(work, ["train/shard.0.mds", "val/shard.0.mds", "tokenizer/tokenizer.json"], "done/0.json")
    assert not work.occupied()
    assert work.published("prep.json") is None
    assert work.local("tokenizer").joinpath("tokenizer.json").read_bytes() == b"tokenizer/tokenizer.json" * 100
    with work.lock("output"):
        work.publish({"train/index.json": b"i", "val/index.json": b"i", "prep.json": b"p"})
    assert set(content(out)) == {
        "tokenizer/tokenizer.json",
        *("train/shard.0.mds", "val/shard.0.mds", "train/index.json", "val/index.json", "prep.json", ".files.json"),
    }
    assert work.published("prep.json") == b"p"
    assert work.occupied()
    assert work.is_clean()


def test_no_folders_of_a_server_are_left(sftp, tmp_path):
    work = RemoteWork(f"{sftp}/x")
    with work.lock("output"):
        work.write("plan.json", b"{}")
        commit(work, ["train/shard.0.mds"], "done/0.json")
        work.publish({"prep.json": b"p"})
    left = sorted(str(path.relative_to(tmp_path / "server")) for path in (tmp_path / "server").rglob("*"))
    assert left == [
        "home",
        "home/x",
        "home/x/.files.json",
        "home/x/prep.json",
        "home/x/train",
        "home/x/train/shard.0.mds",
    ]
    work.discard()
    assert list((tmp_path / "server/home").iterdir()) == []


def test_discarding_takes_what_prep_wrote_and_nothing_else(out):
    work = RemoteWork(out)
    put(f"{out}/train/notes.txt", b"mine")
    put(f"{out}-2/train/shard.0.mds", b"mine")
    commit(work, ["train/shard.0.mds"], "done/0.json")
    work.publish({"train/index.json": b"i", "prep.json": b"p"})
    commit(work, ["train/shard.1.mds"], "done/1.json")
    assert work.occupied()
    work.discard()
    assert set(content(out)) == {"train/notes.txt"}
    assert set(content(f"{out}-2")) == {"train/shard.0.mds"}
    assert work.occupied()


def test_an_output_that_was_copied_there_is_not_deleted(out):
    put(f"{out}/prep.json", b"{}")
    put(f"{out}/train/index.json", b"{}")
    before = content(out)
    with pytest.raises(UserError, match="copied there") as raised:
        RemoteWork(out).discard()
    assert "s3cret" not in str(raised.value)
    assert content(out) == before


def test_a_list_of_files_that_leads_out_of_the_output_is_refused(out):
    put(f"{out}/prep.json", b"{}")
    put(f"{out}/.files.json", json.dumps(["../precious.txt", "prep.json"]).encode())
    put(f"{out.rpartition('/')[0]}/precious.txt", b"mine")
    with pytest.raises(UserError, match=r"\.\./precious"):
        RemoteWork(out).discard()
    assert storage.read_bytes(f"{out.rpartition('/')[0]}/precious.txt") == b"mine"


class Killed(BaseException):
    """Where a process dies."""


@pytest.mark.parametrize("action", ["publish", "discard"])
def test_killed_at_any_request_of_publishing_and_discarding(bucket, action, monkeypatch):
    """A reader never sees an index with a shard missing; what comes next finishes the job."""
    for death in range(40):
        out = f"{bucket}/{action}-{death}"
        work = RemoteWork(out)
        files = {"train/index.json": b"i", "prep.json": b"p"}
        work.write("plan.json", b"{}")
        commit(work, ["train/shard.0.mds", "train/shard.1.mds"], "done/0.json")
        if action == "discard":
            work.publish(files)
            work.write("plan.json", b"{}")
        store = open_store(out)[0]
        left = death

        def dying(method):
            def call(*arguments, **options):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return method(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("put", "remove"):
                patch.setattr(store, name, dying(getattr(store, name)))
            try:
                work.publish(files) if action == "publish" else work.discard()
                finished = True
            except Killed:
                finished = False
        names = set(content(out))
        if "train/index.json" in names or "prep.json" in names:
            assert {"train/shard.0.mds", "train/shard.1.mds"} <= names
        if "prep.json" in names:
            assert "train/index.json" in names
        again = RemoteWork(out)
        again.repair()
        if again.published("prep.json") is None:
            assert not again.occupied()
        if action == "discard":
            again.discard()
            assert content(out) == {}
        else:
            if again.published("prep.json") is None:
                assert again.names("done") == {"0.json"}
                again.publish(files)
            assert set(content(out)) == {*files, "train/shard.0.mds", "train/shard.1.mds", ".files.json"}
            assert again.is_clean()
        if finished:
            assert death > 4
            return
    raise AssertionError("never finished")


def test_a_lock_is_held_by_one(out):
    work = RemoteWork(out)
    with work.lock("output"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is at work there, since") as raised:
            work.lock("output").__enter__()
        assert "s3cret" not in str(raised.value)
        with pytest.raises(UserError, match="is at work"), work.lock("output", shared=True):
            pass
        with work.lock("another"):
            pass
    shared = work.lock("output", shared=True), RemoteWork(out).lock("output", shared=True)
    with shared[0], shared[1], pytest.raises(UserError, match="is at work"), work.lock("output"):
        pass
    with work.lock("output"):
        pass
    assert content(out) == {}


def test_of_many_that_come_at_once_one_at_a_time_has_the_lock(out):
    inside, most, turns = 0, 0, 0
    guard = threading.Lock()

    def contend():
        nonlocal inside, most, turns
        with RemoteWork(out).lock("output", wait=True):
            with guard:
                inside += 1
                most, turns = max(most, inside), turns + 1
            time.sleep(0.05)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, turns) == (1, 4)


def test_the_lock_of_a_process_that_was_killed_counts_for_nothing(bucket):
    out = f"{bucket}/x"
    code = f"""
import time
from llmtrain.prep.remote_work import RemoteWork
with RemoteWork({out!r}).lock("output"):
    print("locked", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match=f"process {process.pid} on"):
                RemoteWork(out).lock("output").__enter__()
        finally:
            process.kill()
            process.wait()
    with RemoteWork(out).lock("output"):
        pass


def test_the_lock_of_another_machine_expires_with_its_heartbeat(bucket, monkeypatch):
    out = f"{bucket}/x"
    holder = remote_lock._Holder("far-away", "another boot", 7, "yesterday", shared=False, held=True)
    put(f"{out}/.work/locks/output/far-away-7.json", json.dumps(holder._asdict()).encode())
    with pytest.raises(UserError, match=r"process 7 on far-away is at work there, since yesterday.*5 minutes after"):
        RemoteWork(out).lock("output").__enter__()
    monkeypatch.setattr(remote_lock, "STALE", 1.0)
    time.sleep(2.5)  # the storage's clock ticks in seconds
    with RemoteWork(out).lock("output"):
        assert "far-away" not in str(RemoteWork(out).names("locks/output"))


def test_a_heartbeat_keeps_a_lock_and_losing_it_stops_writing(bucket, monkeypatch):
    monkeypatch.setattr(remote_lock, "HEARTBEAT", 0.2)
    monkeypatch.setattr(remote_lock, "STALE", 3.0)
    out = f"{bucket}/x"
    work = RemoteWork(out)
    with work.lock("output"):
        (url,) = [f"{out}/.work/locks/output/{name}" for name in work.names("locks/output")]
        first = storage.glob_files(url)[0].mtime
        time.sleep(2.5)
        assert storage.glob_files(url)[0].mtime > first
        commit(work, ["a"], "done/0.json")
        remote_lock._lost.add(url)  # as the heartbeat does it
        with pytest.raises(UserError, match="could not renew its lock"):
            commit(work, ["b"], "done/1.json")
    commit(work, ["b"], "done/1.json")
    assert work.names("done") == {"0.json", "1.json"}


def test_scratch_folders_of_killed_processes_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = """
import sys, time
from llmtrain.prep.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "x").write_text("x")
    print(folder, flush=True)
    time.sleep(600)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        folder = Path(process.stdout.readline().strip())
        with scratch_folder() as mine:
            assert folder.joinpath("x").exists()
            assert list(mine.iterdir()) == []
        process.kill()
    assert folder.exists()
    with scratch_folder() as mine:
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, f"{mine.name}.lock"}
    assert list(tmp_path.iterdir()) == []


# The whole command.
PREP = [sys.executable, "-c", "from llmtrain.cli import main; main()", "prep"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Six files of a few thousand words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(5)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(500)]
    for number in range(6):
        rows = [{"text": " ".join(rng.choices(words, k=rng.randint(5, 400)))} for _ in range(150)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def reference(texts, tmp_path_factory):
    """The recipe's keys, and what it makes of the local files on this machine."""
    folder = tmp_path_factory.mktemp("reference")
    keys = {
        "tokenizer": {"train": {"vocab_size": 400}},
        "max_seq_len": 64,
        "size_limit": 20_000,
        "partition_bytes": 100_000,
        "val_fraction": 0.1,
    }
    made = prep(recipe(folder, keys, texts, folder / "out"))
    assert made.returncode == 0, made.stderr
    files = files_of(folder / "out")
    assert sum("/shard." in name for name in files) > 10
    return keys, files


def recipe(folder, keys, files, out):
    """A recipe's file."""
    path = folder / f"recipe-{random.getrandbits(40):x}.yaml"
    path.write_text(
        yaml.safe_dump({**keys, "out": str(out), "sources": [{"name": "x", "files": [f"{files}/*.jsonl"]}]})
    )
    return path


def prep(*arguments, **options):
    command = [*PREP, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)


def files_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same_output(out, expected):
    """All but what says where the files lie."""
    found = {name: digest for name, digest in content(out).items() if name not in {".files.json", "prep.json"}}
    assert found == {name: digest for name, digest in expected.items() if name != "prep.json"}
    manifest = json.loads(storage.read_bytes(f"{out}/prep.json"))
    recorded = set(json.loads(storage.read_bytes(f"{out}/.files.json")))
    assert recorded == {*found, "prep.json"}
    return manifest


@pytest.mark.slow
def test_from_there_and_to_there_is_the_same_as_here(out, texts, reference, tmp_path):
    keys, expected = reference
    place = out.rpartition("/")[0]
    for path in texts.iterdir():
        put(f"{place}/texts/{path.name}", path.read_bytes())
    file = recipe(tmp_path, keys, f"{place}/texts", out)
    made = prep(file, "--processes", "2")
    assert made.returncode == 0, made.stderr + made.stdout
    same_output(out, expected)
    assert "nothing to do" in prep(file).stdout


@pytest.mark.slow
@pytest.mark.long
def test_another_recipe_replaces_it_only_when_told_to(bucket, texts, tmp_path):
    keys = {"tokenizer": {"train": {"vocab_size": 300}}, "max_seq_len": 64, "size_limit": 20_000}
    file = recipe(tmp_path, keys, texts, f"{bucket}/out")
    assert prep(file).returncode == 0
    before = content(f"{bucket}/out")
    other = prep(file, "max_seq_len=1024")
    assert other.returncode != 0
    assert "made with other settings; changed since: max_seq_len" in other.stderr + other.stdout
    assert content(f"{bucket}/out") == before
    assert prep(file, "max_seq_len=1024", "--overwrite").returncode == 0
    index = json.loads(storage.read_bytes(f"{bucket}/out/train/index.json"))
    names = {f"train/{(shard['zip_data'] or shard['raw_data'])['basename']}" for shard in index["shards"]}
    after = content(f"{bucket}/out")
    assert {name for name in after if name.startswith("train/shard")} == names
    assert not after.items() & {item for item in before.items() if "shard" in item[0]}


@pytest.mark.slow  # each kill costs two starts of Python
@pytest.mark.long
def test_killed_and_run_again_only_redoes_what_was_not_finished(bucket, texts, reference, tmp_path):
    keys, expected = reference
    rng = random.Random(11)
    out = f"{bucket}/out"
    file = recipe(tmp_path, keys, texts, out)
    work = RemoteWork(out)
    kills, kept, seen = 0, set(), set()
    while kills < 8:
        process = subprocess.Popen([*PREP, str(file), "--processes", "1"], start_new_session=True)
        # Every kill falls after one more partition, at a moment of its own.
        while process.poll() is None and work.names("done/tokens") <= seen:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        finished = process.poll() is not None
        if not finished:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        seen = work.names("done/tokens")
        stamps = {(info.url, info.mtime) for info in storage.glob_files(f"{out}/.work/done/tokens/*")}
        assert finished or kept <= stamps, "a finished partition was made again"
        kept = stamps
        if finished:
            break
        assert storage.read_bytes(f"{out}/prep.json") is None or not work.is_clean()
    assert kills >= 3
    last = prep(file, "--processes", "2")
    assert last.returncode == 0, last.stderr
    same_output(out, expected)
    assert work.is_clean()


def test_a_second_process_on_the_same_output_is_refused(bucket, texts, reference, tmp_path):
    out = f"{bucket}/out"
    with RemoteWork(out).lock("output"):
        second = prep(recipe(tmp_path, reference[0], texts, out))
    assert second.returncode != 0
    assert f"process {os.getpid()} on" in second.stderr + second.stdout
    assert content(out) == {}


def test_connections_that_break_cost_retries_not_the_run(bucket, s3, texts, reference, tmp_path):
    keys, expected = reference
    for path in texts.iterdir():
        put(f"{bucket}/texts/{path.name}", path.read_bytes())
    file = recipe(tmp_path, keys, f"{bucket}/texts", f"{bucket}/out")
    with CuttingProxy(int(s3.rpartition(":")[2]), every=3, after=30_000) as proxy:
        made = prep(file, env={**os.environ, "AWS_ENDPOINT_URL": proxy.url})
        assert made.returncode == 0, made.stderr + made.stdout
        assert proxy.cuts >= 5
    same_output(f"{bucket}/out", expected)


@pytest.mark.long
def test_ranks_share_a_remote_output(bucket, texts, reference, tmp_path):
    keys, expected = reference
    file = recipe(tmp_path, keys, texts, f"{bucket}/out")
    for rank in (1, 0):
        made = prep(file, "--rank", rank, "--world-size", 2)
        assert made.returncode == 0, made.stderr + made.stdout
    merged = prep("merge", file)
    assert merged.returncode == 0, merged.stderr + merged.stdout
    same_output(f"{bucket}/out", expected)


def test_conversations_are_prepared_on_this_machine(tmp_path):
    file = recipe(tmp_path, {"task": "finetuning"}, tmp_path, "s3://bucket/out")
    made = prep(file)
    assert made.returncode != 0
    assert "s3://bucket/out: conversations are prepared on this machine" in made.stderr + made.stdout


def test_what_cannot_be_reached_is_said_in_one_message(bucket, texts, reference, tmp_path):
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "LLMTRAIN_STORAGE_ATTEMPTS": "2"}
    made = prep(recipe(tmp_path, reference[0], texts, f"{bucket}/out"), env=environment)
    assert made.returncode != 0
    assert f"{bucket}/out" in made.stderr + made.stdout
    assert "failed 2 times" in made.stderr + made.stdout
    assert "Traceback" not in made.stderr
