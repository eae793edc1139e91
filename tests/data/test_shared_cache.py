"""Several runs at once over one cache folder."""

import fcntl
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data import shared_cache
from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.shared_cache import CacheUse, default_folder, in_turn
from llmtrain.data.text import build_text_loader
from llmtrain.errors import UserError
from llmtrain.prep.mds import ShardWriter
from llmtrain.testing.ranks import as_if_launched, preload

T, ROWS = 8, 150


@pytest.fixture
def remote(tmp_path) -> Path:
    """150 rows of one number each, in shards of a few rows."""
    folder = tmp_path / "remote"
    with ShardWriter(folder, seq_len=T, dtype=np.dtype(np.uint16), compression="zstd:1", size_limit=500) as writer:
        writer.write(np.repeat(np.arange(ROWS, dtype=np.uint16)[:, None], T, axis=1))
    return folder


def build(workers: int = 0, **dataset: Any) -> Any:
    cfg = {"dataset": {"max_seq_len": T, **dataset}, "num_workers": workers, "drop_last": False, "timeout": 60}
    return build_text_loader(
        TextLoaderConfig.model_validate(cfg),
        eos_token_id=0,
        tokenizer_fingerprint="",
        vocab_size=ROWS,
        device_batch_size=4,
    )


def numbers(loader: Any) -> list[int]:
    return sorted(row for batch in loader for row in batch["input_ids"][:, 0].tolist())


def read_together(workers: int, dataset: dict[str, Any], barrier: Any, answers: Any) -> None:
    as_if_launched()
    barrier.wait()
    try:
        found = numbers(build(workers, **dataset))
        answers.put("" if found == list(range(ROWS)) else f"{len(found)} rows")
    except BaseException as problem:
        answers.put(repr(problem))


@pytest.mark.parametrize("times", range(3))
def test_runs_that_fetch_the_same_shards_at_once(remote: Path, tmp_path: Path, times: int) -> None:
    context = multiprocessing.get_context("forkserver")
    preload()
    barrier, answers = context.Barrier(5), context.Queue()
    cache = {"remote": str(remote), "local": str(tmp_path / "cache")}
    processes = [
        context.Process(target=read_together, args=(n % 2, {**cache, "shuffle": True}, barrier, answers))
        for n in range(5)
    ]
    for made in processes:
        made.start()
    found = [answers.get(timeout=600) for _ in processes]
    for made in processes:
        made.join(60)
    assert found == [""] * 5
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tmp", ".zstd")]


def test_a_cache_with_a_limit_is_for_one_run(remote: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shared_cache, "_DYING", 0.2)
    cache = {"remote": str(remote), "local": str(tmp_path / "cache")}
    plain = build(**cache)
    with pytest.raises(UserError, match="cache of another run or loader, and this one has a cache_limit"):
        build(**cache, cache_limit=20_000)
    other = build(**cache)  # several without a limit may share it
    del plain, other
    limited = build(**cache, cache_limit=20_000)
    with pytest.raises(UserError, match="and it has a cache_limit"):
        build(**cache)
    assert numbers(limited) == list(range(ROWS))
    del limited
    assert numbers(build(**cache)) == list(range(ROWS))


def read_and_hang(dataset: dict[str, Any], answers: Any) -> None:
    as_if_launched()
    batches = iter(build(2, **dataset))
    next(batches)
    answers.put(None)
    time.sleep(600)


def test_the_next_run_waits_until_the_workers_of_a_killed_one_are_gone(remote: Path, tmp_path: Path) -> None:
    """They outlive it by some seconds, and hold what it held."""
    context = multiprocessing.get_context("forkserver")
    preload()
    cache = {"remote": str(remote), "local": str(tmp_path / "cache"), "cache_limit": 20_000}
    answers = context.Queue()
    run = context.Process(target=read_and_hang, args=(cache, answers))
    run.start()
    answers.get(timeout=600)
    run.kill()
    run.join(60)
    assert numbers(build(**cache)) == list(range(ROWS))


@contextmanager
def forked() -> Iterator[None]:
    """A process that was forked here, as a loader's worker is, and lives until this ends."""
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_forked_process_keeps_no_lock_of_its_parent(tmp_path: Path, caplog) -> None:
    with ExitStack() as processes:
        use = CacheUse()
        assert use.begin([tmp_path], alone=True) is None
        with in_turn(tmp_path, "a", 60):
            processes.enter_context(forked())
        with in_turn(tmp_path, "a", 0.1):
            assert "fetched twice" not in caplog.text
        use.end(os.getpid())
        with (tmp_path / ".in-use").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or BlockingIOError


def test_the_cache_that_nobody_named_is_found_again(remote: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert numbers(build(remote=str(remote))) == list(range(ROWS))
    cache = Path(default_folder(str(remote)))
    assert cache.is_relative_to(tmp_path)
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("shard*.mds")}
    assert kept
    assert numbers(build(remote=str(remote))) == list(range(ROWS))
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("shard*.mds")} == kept


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's folder")
def test_the_temporary_folder_of_another_user_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "llmtrain-0").mkdir()
    os.chown(tmp_path / "llmtrain-0", 65534, 65534)
    with pytest.raises(UserError, match="give the stream a local"):
        default_folder("s3://bucket/data")


def test_a_process_that_hangs_with_a_lock_does_not_stop_others(tmp_path: Path, caplog) -> None:
    with in_turn(tmp_path, "a", 60), in_turn(tmp_path, "a", 0.1):
        pass
    assert "fetched twice" in caplog.text
    caplog.clear()
    with in_turn(tmp_path, "a", 0.1), in_turn(tmp_path / "none" / "such", "a", 0.1):
        pass
    assert not caplog.text
