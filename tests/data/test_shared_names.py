"""Runs on one machine keep out of each other's shared memory, and leave none, however they end."""

import atexit
import errno
import gc
import itertools
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
from streaming.base import dataset as streaming_dataset
from streaming.base.world import World

from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.shared_names import lock_folder, own_names
from llmtrain.data.text import build_text_loader
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.ranks import as_if_launched, preload, run_ranks

NOBODY = 65534


def build(corpus: TinyCorpus, workers: int = 0, **dataset: Any) -> Any:
    dataset = {"local": str(corpus.train), **dataset}
    cfg = TextLoaderConfig.model_validate({"dataset": {"max_seq_len": 32, **dataset}, "num_workers": workers})
    return build_text_loader(
        cfg,
        eos_token_id=corpus.eos_token_id,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        device_batch_size=8,
    )


def number(loader: Any) -> int:
    found: int = loader.dataset._shm_prefix_int
    return found


def files_of(*numbers: int) -> list[str]:
    """What is left of these datasets, in shared memory and among the locks."""
    places = {Path("/dev/shm"), lock_folder(), Path(tempfile.gettempdir())}
    names = tuple(f"{n:06}_" for n in numbers)
    found = (path.name for place in places if place.is_dir() for path in place.iterdir())
    return sorted(name for name in found if name.startswith(names))


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def process(target: Any, *args: Any) -> Any:
    preload()
    made = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    made.start()
    return made


def start_together(corpus: TinyCorpus, tmp: str, place: int, barrier: Any, answers: Any) -> None:
    folder = Path(tmp) / str(place)
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)  # as each run has its own
    barrier.wait()
    made = []
    try:
        for _ in range(3):
            made.append(build(corpus))
        answers.put([number(loader) for loader in made])
    except BaseException as problem:
        answers.put(repr(problem))
    barrier.wait()  # nobody goes before all have looked


def test_runs_that_start_at_once_have_names_of_their_own_and_leave_nothing(corpus, tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, answers = context.Barrier(6), context.Queue()
    processes = [process(start_together, corpus, str(tmp_path), place, barrier, answers) for place in range(6)]
    found = [answers.get(timeout=600) for _ in processes]
    for made in processes:
        made.join(60)
    assert not [answer for answer in found if isinstance(answer, str)]
    numbers = list(itertools.chain(*found))
    assert len(set(numbers)) == len(numbers) == 18
    assert not files_of(*numbers)
    assert not list(tmp_path.glob("*/*"))


def several(corpus: TinyCorpus) -> list[int]:
    loaders = [build(corpus) for _ in range(4)]
    assert all(sum(1 for _ in loader) for loader in loaders)  # all ranks meet in shared memory
    return [number(loader) for loader in loaders]


def test_ranks_of_runs_that_start_at_once_agree(corpus) -> None:
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: run_ranks(several, 2, corpus), range(3)))
    for ranks in runs:
        assert ranks[0] == ranks[1]
    assert len({n for ranks in runs for n in ranks[0]}) == 12


def test_a_rank_waits_for_memory_that_another_one_is_just_making(corpus) -> None:
    """Without its size it cannot be mapped; Streaming's own classes wait for 7 ms."""
    loader = build(corpus)
    memory = Path(f"/dev/shm/{number(loader):06}_resume")
    memory.touch()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: (time.sleep(0.3), os.truncate(memory, mmap.PAGESIZE)))
        loader.load_state_dict({"epoch": 0, "sample_in_epoch": 8, "num_canonical_nodes": 1, "shuffle_seed": 9176})
        other.result()
    assert memory.read_bytes().startswith(b"{")
    memory.unlink()


def train_and_hang(corpus: TinyCorpus, workers: int, dataset: dict[str, Any], answers: Any, uid: int) -> None:
    """A run in the middle of an epoch, with a state that it was resumed from."""
    os.setpgid(0, 0)
    if uid:
        os.setgid(uid)
        os.setuid(uid)
    as_if_launched()
    loader = build(corpus, workers, **dataset)
    loader.load_state_dict({"epoch": 0, "sample_in_epoch": 8, "num_canonical_nodes": 1, "shuffle_seed": 9176})
    batches = iter(loader)
    next(batches)
    answers.put(number(loader))
    time.sleep(600)


def killed(corpus: TinyCorpus, workers: int = 0, uid: int = 0, **dataset: Any) -> int:
    """The number of a run that was killed in the middle of it, with its workers."""
    answers = multiprocessing.get_context("forkserver").Queue()
    run = process(train_and_hang, corpus, workers, dataset, answers, uid)
    found: int = answers.get(timeout=600)
    # Now, not later: tests that run beside this one remove what dead runs left.
    assert {name[11:] for name in files_of(found)} >= {"resume", "barrier", "llmtrain", "barrier_filelock"}
    os.killpg(run.pid, signal.SIGKILL)
    run.join(60)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one(corpus, workers: int) -> None:
    living = build(corpus)
    dead = [killed(corpus, workers) for _ in range(2)]
    before = files_of(number(living))
    give_up = time.monotonic() + 60
    while files_of(*dead):  # its workers may be dying still
        assert time.monotonic() < give_up
        assert sum(1 for _ in build(corpus)) > 1
    assert sum(1 for _ in living) > 1
    assert set(before) <= set(files_of(number(living)))


def test_what_outlived_its_owner_is_removed_too(corpus) -> None:
    """A process that took part may write a lock file after the last owner has gone."""
    left = lock_folder() / "1000000007_cache_filelock"
    left.touch()
    build(corpus)
    assert not left.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act for another user")
def test_two_users(corpus) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        train = shutil.copytree(corpus.train, Path(folder) / "train")
        for path in [train, *train.iterdir()]:
            path.chmod(0o777)
        theirs = killed(corpus, uid=NOBODY, local=str(train))
        owner = lock_folder() / f"{theirs}_llmtrain"
        assert owner.stat().st_uid == NOBODY
        assert sum(1 for _ in build(corpus))  # not stopped by it,
        assert owner.exists()  # and each user removes what is his own
        ours = build(corpus)
        again = killed(corpus, uid=NOBODY, local=str(train))
        assert not files_of(theirs)  # by the second one
        assert files_of(number(ours))
        for name in files_of(again):
            (Path("/dev/shm") / name).unlink()


def test_a_process_that_makes_many_datasets_keeps_nothing_of_them(corpus) -> None:
    def made() -> int:
        loader = build(corpus)
        sum(1 for _ in loader)
        loader.load_state_dict(loader.state_dict())
        for _ in range(3):
            loader.state_dict()
        return number(loader)

    made()
    gc.collect()
    before = open_files()
    numbers = [made() for _ in range(5)]
    gc.collect()
    assert not files_of(*numbers)
    assert open_files() == before


def test_a_worker_that_is_not_forked_leaves_the_memory_to_its_owner(corpus, monkeypatch) -> None:
    """The tracker would warn of it at the end, and remove it under the other ranks."""
    loader = build(corpus)
    sent, tracked = pickle.dumps(loader.dataset), []
    monkeypatch.setattr(resource_tracker, "register", lambda *what: tracked.append(what))
    received = pickle.loads(sent)
    assert not tracked
    received.next_epoch = 5
    assert loader.dataset.next_epoch == 5
    before = files_of(number(loader))
    for memory in received._names._memories:
        assert not memory.created_shms
        atexit.unregister(memory.cleanup)
    del received, memory
    assert files_of(number(loader)) == before


def test_checkpoints_of_a_resumed_run_keep_no_file_open(corpus) -> None:
    loader = build(corpus)
    loader.load_state_dict(loader.state_dict())
    before = open_files()
    for _ in range(5):
        loader.state_dict()
    assert open_files() == before


def test_names_are_given_back_after_a_mistake(corpus) -> None:
    found = []

    def fail() -> None:
        with own_names():
            found.append(streaming_dataset.get_shm_prefix(["/a"], [None], World.detect())[0])
            assert files_of(*found)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not files_of(*found)


@contextmanager
def failing(target: str, number: int) -> Iterator[None]:
    """Has a system call fail each time; not for ever, so that a test ends that would not."""
    left = iter(range(1000))

    def fail(*_: Any) -> None:
        assert next(left, None) is not None, "tried again and again"
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, fail)
        yield


def test_full_shared_memory_is_no_reason_to_try_for_ever() -> None:
    with own_names() as names:
        with failing("llmtrain.data.shared_names.os.write", errno.ENOSPC):
            streaming_dataset.get_shm_prefix(["/a"], [None], World.detect())
        assert f"{names.number}_llmtrain" in files_of(names.number)
        names._give_back(os.getpid())


def test_a_file_system_without_locks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.shared_names.secrets.randbelow", lambda n: 5)
    locks = failing("llmtrain.data.shared_names.fcntl.flock", errno.ENOLCK)
    with pytest.raises(OSError, match=f"{lock_folder()}: No locks available"), locks, own_names():
        streaming_dataset.get_shm_prefix(["/a"], [None], World.detect())
    assert not files_of(10**9 + 5)


def test_two_streams_of_one_folder_are_refused(corpus) -> None:
    streams = {name: {"local": str(corpus.train)} for name in "ab"}
    cfg = TextLoaderConfig.model_validate({"dataset": {"max_seq_len": 32, "streams": streams}})
    with pytest.raises(Exception, match="Reused local directory"):
        build_text_loader(cfg, eos_token_id=0, tokenizer_fingerprint="", vocab_size=320, device_batch_size=8)
