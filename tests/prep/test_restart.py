import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import StreamingDataset

from llmtrain.data.config import TextLoaderConfig
from llmtrain.errors import UserError
from llmtrain.prep.local_work import LocalWork
from llmtrain.prep.run import Options

COMMAND = [str(Path(sys.executable).parent / "llmtrain"), "prep"]


def start(file, *arguments, **kwargs):
    command = [*COMMAND, str(file), "--processes", "2", *arguments]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, **kwargs)


def processes_of_group(group):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def finished_shards(partial):
    """Shards of the partitions that are marked as done -> (inode, time of the last change)."""
    done = {path.stem for path in (partial / ".work/done/tokens").glob("*.json")}
    shards = [path for path in partial.glob("*/shard.*") if path.name.split(".")[1] in done]
    return {str(path.relative_to(partial)): identity(path) for path in shards}


def identity(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


@pytest.mark.slow
@pytest.mark.parametrize("n_kills", [8, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(corpus, digest, n_kills):
    """Nothing looks complete before it is, nothing finished is done again, and the bytes are those of a quiet run.

    Killed are by turns all processes, and the parent alone.
    """
    moments = random.Random(0)
    expected = corpus.reference()
    file = corpus.file()
    begin = time.monotonic()
    assert start(file).wait() == 0
    usual = time.monotonic() - begin
    assert digest(corpus.out) == expected
    kills = completed = kept = 0
    finished: dict[str, tuple[int, int]] = {}
    subprocess.run(["rm", "-r", str(corpus.out)], check=True)
    while kills < n_kills:
        process = start(file)
        try:
            process.wait(moments.uniform(0.05, 1.3) * usual)
        except subprocess.TimeoutExpired:
            if kills % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            kills += 1
            end = time.monotonic() + 10
            while processes_of_group(process.pid):
                assert time.monotonic() < end, "workers outlive their parent"
                time.sleep(0.01)
        assert process.returncode in (0, -signal.SIGKILL)
        place = corpus.out if corpus.out.exists() else corpus.partial
        assert {path: identity(place / path) for path in finished} == finished  # not written again
        kept += len(finished)
        finished = finished_shards(corpus.partial)
        if corpus.out.exists():
            assert (corpus.out / "prep.json").exists()
            assert {k: v for k, v in digest(corpus.out).items() if not k.startswith(".work/")} == expected
            start(file).wait()  # mends what a kill in the last moment left
            assert digest(corpus.out) == expected
            assert not corpus.partial.exists()
            subprocess.run(["rm", "-r", str(corpus.out)], check=True)
            finished, completed = {}, completed + 1
    assert start(file).wait() == 0
    assert digest(corpus.out) == expected
    assert kept > 0
    assert sorted(path.name for path in corpus.folder.iterdir()) == ["docs", "out", "recipe.yaml", "reference"]


# Ends the process at the n-th change of the folders beside the output while it is published.
DIE = """
import os, shutil, sys
from pathlib import Path
from llmtrain.prep import local_work, run
left = int(sys.argv[1])

def counted(function):
    def call(*args, **kwargs):
        global left
        if publishing:
            left -= 1
            if left < 0:
                os._exit(77)
        return function(*args, **kwargs)
    return call

publishing = False
publish = local_work.LocalWork.publish
def marked(self, files):
    global publishing
    publishing = True
    publish(self, files)
    publishing = False
local_work.LocalWork.publish = marked
for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (os, "rmdir")):
    setattr(owner, name, counted(getattr(owner, name)))
run.prepare(Path(sys.argv[2]), sys.argv[3:])
os._exit(left == 10_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("older", "every"),
    [(True, 5), pytest.param(True, 1, marks=pytest.mark.long), pytest.param(False, 1, marks=pytest.mark.long)],
)
def test_killed_between_any_two_steps_of_publishing(corpus, digest, older, every):
    changes = {"partition_bytes": 500_000}
    expected = corpus.reference(**changes)
    file = corpus.file(**changes, overwrite=older)
    for step in range(0, 1000, every):
        if older:
            corpus.make(**changes, max_seq_len=32)
            before = digest(corpus.out)
        done = subprocess.run([sys.executable, "-c", DIE, str(step), str(file)], stdout=subprocess.DEVNULL)
        if done.returncode != 77:
            break
        visible = {k: v for k, v in digest(corpus.out).items() if not k.startswith(".work/")}
        old = corpus.out.with_name(".out.old")
        assert visible in [expected, {}, *([before] if older else [])]
        if older and not visible:  # between two renames: the older output is beside it
            assert digest(old) == before
        corpus.make(**changes, overwrite=older)
        assert digest(corpus.out) == expected
        assert sorted(path.name for path in corpus.folder.iterdir()) == ["docs", "out", "recipe.yaml", "reference"]
        subprocess.run(["rm", "-r", str(corpus.out)], check=True)
    assert done.returncode == 0
    assert step > 8


def test_what_is_done_is_not_done_again(corpus, digest):
    expected = corpus.reference()
    corpus.make(Options(only_plan=True))
    with corpus.files[3].open("rb") as file:
        good = file.read()
    time_of_change = corpus.files[3].stat().st_mtime_ns
    # The last file is not readable as JSON when its partition's turn comes, although it looks as it did.
    corpus.files[3].write_bytes(b"x" * len(good))
    os.utime(corpus.files[3], ns=(time_of_change, time_of_change))
    with pytest.raises(UserError, match=r"3\.jsonl, line 1"):
        corpus.make()
    shards = finished_shards(corpus.partial)
    assert len(shards) > 30
    assert not corpus.out.exists()
    assert not list(corpus.folder.glob(".out.partial/*/index.json"))
    corpus.files[3].write_bytes(good)
    os.utime(corpus.files[3], ns=(time_of_change, time_of_change))
    _, said = corpus.make()
    assert "going on: " in said
    assert {name: identity(corpus.out / name) for name in shards} == shards
    assert digest(corpus.out) == expected


@pytest.fixture
def stopped(corpus):
    """A corpus with unfinished work: some partitions are done."""
    corpus.make(Options(only_plan=True))
    from llmtrain.prep.job import job_of
    from llmtrain.prep.partition import make_partition

    for number in (0, 3):
        make_partition(job_of(corpus.recipe()), number)
    return corpus


def test_another_recipe_is_refused_on_unfinished_work(stopped, digest):
    before = digest(stopped.partial)
    with pytest.raises(UserError, match=r"unfinished work.*changed since: max_seq_len, val_fraction.*--overwrite"):
        stopped.make(max_seq_len=32, val_fraction=0.2)
    assert digest(stopped.partial) == before
    stopped.make(max_seq_len=32, val_fraction=0.2, overwrite=True)
    assert digest(stopped.out) == stopped.reference(max_seq_len=32, val_fraction=0.2)


def test_overwrite_with_the_same_recipe_goes_on(stopped):
    shards = finished_shards(stopped.partial)
    _, said = stopped.make(overwrite=True)
    assert "going on: 2 of " in said
    assert all((stopped.out / name).stat().st_ino == inode for name, (inode, _) in shards.items())


@pytest.mark.parametrize("change", ["content", "touched", "gone", "new"])
def test_changed_inputs_are_refused_on_unfinished_work(stopped, digest, change):
    path = stopped.files[1]
    if change == "content":
        data = path.read_bytes()
        path.write_bytes(data.replace(b"alpha", b"ALPHA", 1))
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "gone":
        path.unlink()
    else:
        (path.parent / "5.jsonl").write_text('{"text": "more"}\n')
    which = "" if change == "new" else r" \(.*1\.jsonl"
    with pytest.raises(UserError, match=f"changed since: the files of docs{which}"):
        stopped.make()
    stopped.make(overwrite=True)
    assert digest(stopped.out) == stopped.reference()


def test_a_plan_without_finished_work_gives_way(corpus):
    corpus.make(Options(only_plan=True))
    content, _ = corpus.make(max_seq_len=32)
    assert content["max_seq_len"] == 32


def test_an_input_that_changes_during_the_work(stopped):
    """The plan was compared; then a file is touched before its partition's turn."""
    from llmtrain.prep.job import job_of
    from llmtrain.prep.partition import make_partition

    os.utime(stopped.files[0], ns=(1, 1))
    with pytest.raises(UserError, match=r"0\.jsonl has changed since the work was planned.*--overwrite"):
        make_partition(job_of(stopped.recipe()), 1)


def test_a_second_process_is_refused(corpus, digest):
    expected = corpus.reference()
    with LocalWork(corpus.out).lock("output"):
        second = start(corpus.file(), stderr=subprocess.PIPE)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"another `llmtrain prep` is at work on {corpus.out} (process {os.getpid()} on " in said
        assert "Traceback" not in said
        with pytest.raises(UserError, match="another"):
            corpus.make()
    corpus.make()
    assert digest(corpus.out) == expected


def test_an_older_output_stays_until_the_new_one_is_complete(corpus, digest):
    corpus.make(max_seq_len=32)
    older = digest(corpus.out)
    with corpus.files[3].open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"3\.jsonl, line 401"):
        corpus.make(overwrite=True)
    assert digest(corpus.out) == older
    assert finished_shards(corpus.partial)
    text = corpus.files[3].read_text()
    corpus.files[3].write_text(text.removesuffix("{broken\n"))
    corpus.make(overwrite=True)
    assert digest(corpus.out) == corpus.reference()


def test_somebody_elses_folder_that_comes_into_being_is_not_touched(stopped):
    stopped.out.mkdir()
    (stopped.out / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not made by"):
        stopped.make(overwrite=True)
    with pytest.raises(UserError, match=r"come into being meanwhile"):
        LocalWork(stopped.out).publish({})
    assert (stopped.out / "thesis.txt").read_text() == "x"


def test_the_result_is_read_by_streaming_and_by_the_loader(corpus, tmp_path):
    content, _ = corpus.make(Options(processes=2))
    for split in ("train", "val"):
        dataset = StreamingDataset(
            remote=str(corpus.out / split),
            local=str(tmp_path / f"cache-{split}"),
            validate_hash="xxh64",
            batch_size=1,
            num_canonical_nodes=1,
        )
        assert dataset.size == content["splits"][split]["samples"]
        tokens = np.concatenate([dataset[i]["tokens"] for i in range(dataset.size)])
        share = np.unique(tokens, return_counts=True)[1] / len(tokens)
        assert content["splits"][split]["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())
        index = json.loads((corpus.out / split / "index.json").read_text())
        names = [shard["zip_data"]["basename"] for shard in index["shards"]]
        assert names == sorted(names)
        assert {path.name for path in (corpus.out / split).iterdir()} == {"index.json", *names}
        assert index["llmtrain"]["tokenizer_fingerprint"] == content["tokenizer_fingerprint"]
    TextLoaderConfig.model_validate(
        {"name": "text", "dataset": {"local": str(corpus.out), "split": "train", "max_seq_len": 64}, "drop_last": True}
    )


def test_what_was_being_discarded_is_not_taken_for_finished(stopped, digest, monkeypatch):
    """Killed in `discard`: the plan is gone, the other recipe's partitions and their marks are there."""
    (stopped.partial / ".work/plan.json").unlink()
    assert len(finished_shards(stopped.partial)) > 0
    stopped.make(max_seq_len=32)
    assert digest(stopped.out) == stopped.reference(max_seq_len=32)


def test_what_cannot_be_discarded_is_an_error(stopped, monkeypatch):
    def refused(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refused)
    with pytest.raises(UserError, match="cannot be written"):
        LocalWork(stopped.out).discard()


@pytest.mark.parametrize("what", ["planned anew", "finished"])
def test_a_worker_that_the_engine_lost_writes_nothing(corpus, what):
    """Its unit goes on while another command discards the plan, and makes another, or finishes."""
    from llmtrain.prep.input_documents import documents_of
    from llmtrain.prep.job import job_of
    from llmtrain.prep.partition import write_partition
    from llmtrain.prep.readers import BadInput

    corpus.make(Options(only_plan=True))
    job, bad = job_of(corpus.recipe()), BadInput("fail")
    plan = corpus.partial / ".work/plan.json"

    def documents():
        yield from documents_of(job, 0, bad)
        if what == "finished":
            plan.unlink()
        else:
            plan.write_bytes(replace(job.plan(), core="tokenizers").to_json())

    with pytest.raises(UserError, match="discarded and planned anew" if what == "planned anew" else "there is no plan"):
        write_partition(job, 0, documents(), bad)
    assert not (corpus.partial / ".work/done").exists()
    assert not list(corpus.partial.glob("*/shard.*"))


def test_an_input_that_changes_while_it_is_read(stopped):
    from llmtrain.prep.input_documents import documents_of
    from llmtrain.prep.job import job_of
    from llmtrain.prep.readers import BadInput

    documents = documents_of(job_of(stopped.recipe()), 1, BadInput("fail"))
    next(documents)
    os.utime(stopped.files[0], ns=(1, 1))
    with pytest.raises(UserError, match=r"0\.jsonl has changed since the work was planned"):
        list(documents)


def test_the_output_of_a_link_lies_where_the_link_leads(corpus, digest):
    expected = corpus.reference()
    (corpus.folder / "disk").mkdir()
    corpus.out.symlink_to(corpus.folder / "disk" / "there")
    corpus.make()
    assert corpus.out.is_symlink()
    assert digest(corpus.folder / "disk" / "there") == expected
    assert [path.name for path in (corpus.folder / "disk").iterdir()] == ["there"]
    assert "nothing to do" in corpus.make()[1]
    assert not list(corpus.folder.glob(".out*"))


def test_an_output_above_the_current_folder(corpus, monkeypatch):
    (corpus.folder / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(corpus.folder / "above" / "here")
    with pytest.raises(UserError, match="exists and was not made by"):
        corpus.make(out="..")
    monkeypatch.chdir("/proc")  # a file system of its own
    with pytest.raises(UserError, match=r"/proc is where a file system is mounted"):
        corpus.make(out=".")


def test_temporary_files_of_another_container_stay(corpus, monkeypatch):
    """Two containers with the machine's name and processes of their own: ids of one mean nothing in the other."""
    work = LocalWork(corpus.out)
    with work.temporary() as folder:
        monkeypatch.setattr("llmtrain.prep.local_work._is_running", lambda pid: False)
        place = "llmtrain.prep.local_work._place"
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(place, lambda: f"{socket.gethostname()}-4026539999")
            with work.lock("rank-00001"):
                pass
        assert folder.exists()
        with work.lock("rank-00001"):
            pass
        assert not folder.exists()


def test_a_tokenizer_that_is_another_one_for_a_worker(corpus, small_tokenizer):
    """As when a name of the hub stands for another revision on another machine."""
    from llmtrain.prep.job import job_of
    from llmtrain.prep.partition import make_partition

    folder = corpus.folder / "tokenizer"
    subprocess.run(["cp", "-r", str(small_tokenizer), str(folder)], check=True)
    recipe = corpus.recipe(tokenizer={"name": str(folder)})
    corpus.make(Options(only_plan=True), tokenizer={"name": str(folder)})
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec, indent=7))  # the same, in other words
    make_partition(job_of(recipe), 0)
    spec["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    from llmtrain.prep import partition

    partition._opened.cache_clear()  # a worker of its own
    with pytest.raises(UserError, match=r"is another one on .* than the work was planned with"):
        make_partition(job_of(recipe), 1)
