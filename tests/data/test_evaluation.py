"""An evaluation counts every row once, however many ranks, workers and rows a batch there are."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.evaluation import share
from llmtrain.data.text import build_text_loader
from llmtrain.prep.mds import ShardWriter
from llmtrain.testing.ranks import run_ranks

T = 8


def write(folder: Path, rows: int, first: int = 1) -> str:
    """Rows of one number each: `first`, `first` + 1, ... A few rows a shard."""
    with ShardWriter(folder, seq_len=T, dtype=np.dtype(np.uint16), compression="zstd:1", size_limit=500) as writer:
        writer.write(np.repeat(np.arange(first, first + rows, dtype=np.uint16)[:, None], T, axis=1))
    return str(folder)


@given(n=st.integers(1, 60), batch=st.integers(1, 9), ranks=st.integers(1, 7), workers=st.integers(1, 4))
def test_shares_are_all_rows_and_equal(n: int, batch: int, ranks: int, workers: int) -> None:
    seen: list[int] = []
    batches_of: dict[int, list[tuple[int, int]]] = {}
    for rank in range(ranks):
        queues = []
        for worker in range(workers):
            rows, blanks = share(n, batch_size=batch, rank=rank, ranks=ranks, worker=worker, workers=workers)
            seen += rows.tolist()
            numbered = [*rows.tolist(), *[-1] * blanks]
            queues.append([numbered[i : i + batch] for i in range(0, len(numbered), batch)])
        # As a DataLoader takes them: in turn, one batch of each worker.
        in_turn = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
        for b, rows_of_batch in enumerate(in_turn):
            batches_of.setdefault(b, []).append((rank, len(rows_of_batch)))
            real = [row for row in rows_of_batch if row >= 0]
            assert all(b * batch * ranks <= row < (b + 1) * batch * ranks for row in real)
    assert sorted(seen) == list(range(n))
    for sizes in batches_of.values():
        assert [rank for rank, _ in sizes] == list(range(ranks))
        assert len({size for _, size in sizes}) == 1


def read(dataset: dict[str, Any], batch_size: int, workers: int, times: int) -> list[list[dict[str, torch.Tensor]]]:
    cfg = TextLoaderConfig.model_validate(
        {
            "dataset": {"max_seq_len": T, "return_sample_ids": True, **dataset},
            "num_workers": workers,
            "drop_last": False,
        }
    )
    loader = build_text_loader(
        cfg,
        eos_token_id=0,
        tokenizer_fingerprint="",
        vocab_size=100,
        device_batch_size=batch_size,
        evaluation=True,
    )
    evaluations = [list(loader) for _ in range(times)]
    assert all(len(batches) == len(loader) for batches in evaluations)  # Composer goes by it
    loader._stop_workers()
    return evaluations


def targets(evaluation: list[list[dict[str, torch.Tensor]]]) -> Counter[int]:
    """How often each number stands as a label, in all ranks' batches of one evaluation."""
    counted: Counter[int] = Counter()
    for batches in evaluation:
        for batch in batches:
            blank = batch["sample_id"] == -1
            assert bool((batch["labels"][blank] == -100).all())
            assert torch.equal(batch["labels"][~blank], batch["input_ids"][~blank])
            counted.update(batch["labels"][~blank].flatten().tolist())
    return counted


@pytest.mark.parametrize(
    ("ranks", "batch_size", "workers"), [(1, 5, 2), (2, 1, 0), (2, 4, 3), (3, 1, 0), (3, 4, 2), (3, 30, 1)]
)
def test_every_row_of_real_ranks_counts_once(ranks: int, batch_size: int, workers: int, tmp_path: Path) -> None:
    remote = write(tmp_path / "remote", 23)
    dataset = {"remote": remote, "local": str(tmp_path / "cache"), "num_canonical_nodes": 4}
    found = run_ranks(read, ranks, dataset, batch_size, workers, 2)
    for evaluation in zip(*found, strict=True):
        assert targets(list(evaluation)) == dict.fromkeys(range(1, 24), T)
        assert len({tuple(len(batch["labels"]) for batch in batches) for batches in evaluation}) == 1
    assert list((tmp_path / "cache").glob("shard.*"))


def test_fewer_rows_than_ranks(tmp_path: Path) -> None:
    found = run_ranks(read, 3, {"local": write(tmp_path / "one", 1)}, 4, 2, 1)
    assert [[batch["sample_id"].tolist() for batch in batches] for (batches,) in found] == [[[0]], [[-1]], [[-1]]]
    assert targets([batches for (batches,) in found]) == {1: T}


def test_mixture_counts_each_stream_and_is_the_same_each_time(tmp_path: Path) -> None:
    streams = {
        "a": {"local": write(tmp_path / "a", 11)},
        "b": {"local": write(tmp_path / "b", 13, first=50)},
        "half": {"local": write(tmp_path / "c", 9, first=80), "choose": 4},
    }
    settings = {"streams": streams, "shuffle": True, "shuffle_seed": 5}
    one = run_ranks(read, 1, settings, 6, 0, 2)
    two = run_ranks(read, 2, settings, 3, 2, 2)
    expected = targets([one[0][0]])
    assert set(expected.values()) == {T}
    assert len(expected) == 11 + 13 + 4
    for evaluation in range(2):
        assert targets([one[0][evaluation]]) == expected
        assert targets([rank[evaluation] for rank in two]) == expected
    orders = [[batch["sample_id"] for batch in batches] for batches in one[0]]
    flat = [torch.cat(order).tolist() for order in orders]
    assert flat[0] == flat[1]  # a subset of batches is the same one in each evaluation
    assert flat[0] != sorted(flat[0])
    of_two = [torch.cat([rank[0][b]["sample_id"] for rank in two]) for b in range(4)]
    assert [ids.sort().values.tolist() for ids in of_two] == [ids.sort().values.tolist() for ids in orders[0][:4]]
