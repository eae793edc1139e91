"""Runs that start on one machine at the same moment keep out of each other's shared memory."""

import fcntl
import itertools
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.shared_names import lock_file, one_dataset_at_a_time
from llmtrain.data.text import build_text_loader
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.ranks import preload, run_ranks


def build(corpus: TinyCorpus) -> Any:
    cfg = TextLoaderConfig.model_validate({"dataset": {"local": str(corpus.train), "max_seq_len": 32}})
    return build_text_loader(
        cfg,
        eos_token_id=corpus.eos_token_id,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=corpus.vocab_size,
        device_batch_size=8,
    )


def start_together(corpus: TinyCorpus, tmp: str, number: int, barrier: Any, answers: Any) -> None:
    folder = Path(tmp) / str(number)
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)  # as each run has its own
    barrier.wait()
    made = []
    try:
        for _ in range(3):
            made.append(build(corpus))
        answers.put([loader.dataset._shm_prefix_int for loader in made])
    except BaseException as problem:
        answers.put(repr(problem))
    barrier.wait()  # nobody goes before all have looked


def test_runs_that_start_at_once_have_names_of_their_own(corpus, tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    preload()
    barrier, answers = context.Barrier(6), context.Queue()
    processes = [
        context.Process(target=start_together, args=(corpus, str(tmp_path), number, barrier, answers))
        for number in range(6)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert not [answer for answer in found if isinstance(answer, str)]
    numbers = list(itertools.chain(*found))
    assert len(set(numbers)) == len(numbers) == 18


def several(corpus: TinyCorpus) -> list[int]:
    loaders = [build(corpus) for _ in range(4)]
    return [loader.dataset._shm_prefix_int for loader in loaders]


def test_ranks_of_runs_that_start_at_once_agree(corpus) -> None:
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: run_ranks(several, 2, corpus), range(3)))
    for ranks in runs:
        assert ranks[0] == ranks[1]


def hold() -> int:
    file = os.open(lock_file(), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_run_that_hangs_with_the_lock_does_not_stop_others(caplog) -> None:
    file = hold()
    try:
        began = time.monotonic()
        with one_dataset_at_a_time(patience=0.3):
            assert time.monotonic() - began >= 0.3
    finally:
        os.close(file)
    assert "going on without" in caplog.text
    caplog.clear()
    with one_dataset_at_a_time(patience=60):
        assert time.monotonic() - began < 30
    assert not caplog.text


def test_the_lock_is_given_back_after_a_mistake() -> None:
    with pytest.raises(ZeroDivisionError), one_dataset_at_a_time():
        raise ZeroDivisionError
    os.close(hold())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_making_a_dataset_leaves_no_names_of_others_open(corpus) -> None:
    """Streaming opens those of all datasets on the machine, and would keep them."""
    kept, grown = [], []
    for _ in range(4):
        before = open_files()
        kept.append(build(corpus))
        grown.append(open_files() - before)
    assert grown[-1] <= grown[1], grown
