"""Tokenized once: found again, made anew when anything that decides over it changes; rows that are no use are told."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from llmtrain.conversations.messages import BadExample
from llmtrain.data.finetuning import tokenize_many
from llmtrain.data.finetuning.show import count
from llmtrain.data.finetuning.store import ExampleStore, StoreWriter, work_prefix
from llmtrain.errors import UserError
from tests.data.finetuning.conftest import chat, write_rows


def stores(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture
def rows(tmp_path):
    """A file of good rows, and one of which some are none."""
    bad = [
        chat(0),
        {"messages": [{"role": "user", "content": "Say 1."}]},
        {"messages": [{"role": "user", "content": "Say 2."}, {"role": "assistant", "content": " "}]},
        {"prompt": "Say 3.", "completion": 3},
        {"nothing": "known"},
        chat(5),
    ]
    write_rows(tmp_path / "good.jsonl", [chat(number) for number in range(30)])
    path = write_rows(tmp_path / "bad.jsonl", bad)
    with path.open("ab") as file:
        file.write(b'{"prompt": "a", "response": "\xff"}\n{"prompt": \n')
    return tmp_path


def test_the_next_run_finds_what_was_tokenized(build, rows, tmp_path):
    settings = {"files": str(rows / "good.jsonl"), "cache_dir": str(tmp_path / "cache")}
    first = build(**settings)
    (name,) = stores(tmp_path / "cache")
    before = (tmp_path / "cache" / name / "ids.bin").stat().st_mtime_ns
    start = time.process_time()
    second = build(**settings)
    assert time.process_time() - start < 1
    assert (tmp_path / "cache" / name / "ids.bin").stat().st_mtime_ns == before
    assert first.dataset.stores[0].ids(3).tolist() == second.dataset.stores[0].ids(3).tolist()


def test_what_decides_over_the_examples_decides_over_the_store(build, rows, tmp_path):
    settings = {"files": str(rows / "good.jsonl"), "cache_dir": str(tmp_path / "cache")}
    build(**settings)
    build(**settings, shuffle=True, packing=True, shuffle_seed=4)  # these do not
    assert len(stores(tmp_path / "cache")) == 1
    build(**settings, target_prompts="all")
    build(**settings, limit=10)
    build(**{**settings, "max_seq_len": 64})
    assert len(stores(tmp_path / "cache")) == 4
    write_rows(rows / "good.jsonl", [chat(number) for number in range(29)])
    assert len(build(**settings).dataset.order.lengths) == 29
    assert len(stores(tmp_path / "cache")) == 5


def test_rows_that_are_no_use_are_dropped_and_told(build, rows):
    loader = build(files=str(rows / "bad.jsonl"))
    counts = count(loader)
    assert (counts.rows_read, counts.examples) == (8, 2)
    assert sum(counts.dropped.values()) == 6
    assert counts.dropped["invalid UTF-8"] == counts.dropped["empty turn"] == counts.dropped["broken JSON"] == 1
    report = loader.dataset.stores[0].report
    places = {entry["reason"]: entry["place"] for entry in report.first_dropped}
    assert places["invalid UTF-8"].endswith("bad.jsonl, line 7")
    assert places["empty turn"].endswith("bad.jsonl, line 3")
    assert loader.dataset.stores[0].place(1).endswith("bad.jsonl, line 6")


def test_strict_names_the_first_bad_row_also_when_it_was_read_before(build, rows, tmp_path):
    settings = {"files": str(rows / "bad.jsonl"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: .*Mend or remove the row"):
        build(**settings, strict=True)
    assert stores(tmp_path / "cache") == []
    build(**settings)
    with pytest.raises(UserError, match=r"strict: true, and nothing can be learnt from these rows:\n(.*\n)*.*line 2"):
        build(**settings, strict=True)


def test_nothing_left_to_train_on(build, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"messages": []}] * 9 + [{"prompt": "a", "response": ""}])
    with pytest.raises(UserError) as problem:
        build(files=str(path), cache_dir=str(tmp_path / "cache"))
    assert "there is nothing to train on: all 10 rows were dropped" in str(problem.value)
    assert "9 x no turns" in str(problem.value)
    assert "x.jsonl, line 10" in str(problem.value)
    assert stores(tmp_path / "cache") == []
    path.write_text("\n")
    with pytest.raises(UserError, match="it has no rows"):
        build(files=str(path), cache_dir=str(tmp_path / "cache"))


def test_several_processes_make_the_same_store(build, tmp_path, monkeypatch):
    rows = [chat(number) if number % 7 else {"messages": []} for number in range(200)] + [chat(0, 200)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    made = []
    for here, cores in ((4096, {0, 1}), (32, {0, 1}), (32, {0})):
        monkeypatch.setattr(tokenize_many, "_BATCH", 16)
        monkeypatch.setattr(tokenize_many, "_HERE", here)
        monkeypatch.setattr(tokenize_many.os, "sched_getaffinity", lambda _, cores=cores: cores)
        cache_dir = str(tmp_path / str(len(made)))
        made.append(build(files=str(path), max_seq_len=256, cache_dir=cache_dir).dataset.stores[0])
    first, *others = made
    assert first.report.noticed == {"truncated": 1}
    for other in others:
        assert other.offsets.tolist() == first.offsets.tolist()
        for file in ("ids.bin", "trained.bin", "places.txt"):
            assert (other.folder / file).read_bytes() == (first.folder / file).read_bytes()
        assert (other.report.dropped, other.report.noticed) == (first.report.dropped, first.report.noticed)


def test_a_tokenizing_process_that_is_killed_is_an_error(build, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "x.jsonl", [chat(number) for number in range(200)])
    monkeypatch.setattr(tokenize_many, "_HERE", 0)
    monkeypatch.setattr(tokenize_many, "_work", lambda tokenize, examples: os._exit(9))
    monkeypatch.setattr(tokenize_many.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UserError, match="a process that was tokenizing was killed"):
        build(files=str(path), cache_dir=str(tmp_path / "cache"))
    assert stores(tmp_path / "cache") == []


def test_long_examples_are_cut_or_dropped(build, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [chat(0, 5), chat(1, 200)])
    cut = build(files=str(path)).dataset
    assert cut.order.lengths.max() == 128
    assert cut.stores[0].report.noticed == {"truncated": 1}
    dropped = build(files=str(path), long_examples="drop").dataset
    assert len(dropped.order.lengths) == 1
    assert dropped.stores[0].report.dropped == {"too long": 1}


def test_ids_of_another_vocabulary(build, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"turns": [{"input_ids": [1, 2], "labels": [3, 400]}]}])
    settings = {"files": str(path), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="400"):
        build(**settings, vocab_size=322)


def test_a_killed_run_leaves_nothing_that_is_taken_for_a_store(build, rows, tmp_path, monkeypatch):
    """The second run waits for the first one's lock, and then does its work."""
    settings = {"files": str(rows / "good.jsonl"), "cache_dir": str(tmp_path / "cache")}
    fork = multiprocessing.get_context("fork")
    adding = fork.Event()

    def add_for_ever(*_):
        adding.set()
        time.sleep(60)

    with monkeypatch.context() as slow:
        slow.setattr(StoreWriter, "add", add_for_ever)
        killed = fork.Process(target=build, kwargs=settings)
        killed.start()
    assert adding.wait(30)
    assert [name for name in stores(tmp_path / "cache") if name.startswith(".")]
    threading.Timer(0.7, killed.kill).start()
    assert len(build(**settings)) == 8
    assert not killed.is_alive()
    (name,) = stores(tmp_path / "cache")
    assert not name.startswith(".")


def test_a_store_keeps_what_it_is_given(tmp_path):
    with StoreWriter(tmp_path / "s", vocab_size=70_000, source="test") as writer:
        writer.add(np.array([1, 69_999]), np.array([False, True]), "a\nb, line 1")
        writer.drop(BadExample("empty turn", "turn 2"), "a, line 2")
        writer.add(np.array([5]), np.array([False]), "a, line 3")
    store = ExampleStore(tmp_path / "s")
    assert len(store) == 2
    assert store.lengths.tolist() == [2, 1]
    assert store.ids(0).tolist() == [1, 69_999]
    assert store.trained(0).tolist() == [False, True]
    assert (store.place(0), store.place(1)) == ("a b, line 1", "a, line 3")
    assert store.report.reasons() == "1 x empty turn: a, line 2 (turn 2)"
    assert json.loads((tmp_path / "s" / "report.json").read_text())["largest_id"] == 69_999


def test_a_store_that_fails_is_not_there(tmp_path):
    with (
        pytest.raises(UserError, match="outside of the model's vocabulary of 10"),
        StoreWriter(tmp_path / "s", vocab_size=10, source="test") as writer,
    ):
        writer.add(np.array([1, 11]), np.array([False, True]), "a, line 1")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_make_the_same_store(tmp_path):
    for ids in ([1], [2]):
        with StoreWriter(tmp_path / "s", vocab_size=10, source="test") as writer:
            writer.add(np.array(ids), np.array([False]), "a")
    assert ExampleStore(tmp_path / "s").ids(0).tolist() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("file", ["ids.bin", "trained.bin", "both", "offsets.npy", "report.json"])
def test_a_damaged_store_is_made_again(build, rows, tmp_path, caplog, file):
    """Of examples behind the end of a file that was cut there would be nothing left, and nobody would notice."""
    settings = {"files": str(rows / "good.jsonl"), "cache_dir": str(tmp_path / "cache")}
    before = build(**settings).dataset
    tokens = [before.example(number)[0].tolist() for number in range(len(before.order.lengths))]
    (name,) = stores(tmp_path / "cache")
    folder = tmp_path / "cache" / name
    for part in ("ids.bin", "trained.bin") if file == "both" else (file,):
        path = folder / part
        os.truncate(path, path.stat().st_size // 2)
    after = build(**settings).dataset
    assert "is damaged" in caplog.text
    assert [after.example(number)[0].tolist() for number in range(len(after.order.lengths))] == tokens
    assert stores(tmp_path / "cache") == [name]


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(build, rows, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"(?s)No space left.*dataset\.cache_dir"):
        build(files=str(rows / "good.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert stores(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_what_another_machine_is_making_is_left_alone(build, rows, tmp_path):
    settings = {"files": str(rows / "good.jsonl"), "cache_dir": str(tmp_path / "cache")}
    build(**settings)
    (name,) = stores(tmp_path / "cache")
    folder = tmp_path / "cache" / name
    shutil.rmtree(folder)
    mine = folder.with_name(work_prefix(folder) + "abc.tmp")
    others = folder.with_name(f".{folder.name}.another-machine.abc.tmp")
    mine.mkdir()
    others.mkdir()
    build(**settings)
    assert not mine.exists()
    assert others.exists()


ORPHANS = """
import multiprocessing, os, signal, sys, time
from collections import Counter
from llmtrain.data.finetuning import tokenize_many

class Tokenize:
    counts = Counter()
    def __call__(self, examples):
        os.write(1, b"%d\\n" % os.getpid())  # in one piece: print writes the end of the line separately
        time.sleep(0.2)
        return list(examples)

tokenize_many._HERE, tokenize_many._BATCH = 0, 1
tokenize_many.os.sched_getaffinity = lambda _: {0, 1}
for number, _ in enumerate(tokenize_many.tokenized(iter([("", str(n)) for n in range(1000)]), Tokenize())):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_of_a_killed_run_end_too(tmp_path):
    """They have its lock: the next run would wait for them for ever."""
    killed = subprocess.run([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    # `run` returns when the last process that has its standard output is gone.
    assert killed.returncode == -signal.SIGKILL
    assert len(set(killed.stdout.split())) == 2
