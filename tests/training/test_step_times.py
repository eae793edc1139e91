import gc
import time
import weakref
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llmtrain.training.step_times import Times, percentile, slow_ranks, time_fetches


def times(compute: float, wait: float = 0.0, step: float = 1.0) -> Times:
    return Times("host", [step] * 10, [wait] * 10, [compute] * 10)


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.0


def test_a_rank_that_computes_longer_is_named() -> None:
    found = slow_ranks([times(0.3), times(0.3), times(0.3), times(0.57)], 1.5)
    assert found == {3: "slow        rank 3 (host) computes 1.9x longer than the median rank (p50 1,000 ms a step)"}
    assert slow_ranks([times(0.3), times(0.4)], 1.5) == {}
    assert set(slow_ranks([times(0.6), times(0.3)], 1.5)) == {0}
    assert slow_ranks([times(0.001), times(0.003)], 1.5) == {}  # of a second: it costs nothing
    assert slow_ranks([times(0.9)], 1.5) == {}


def test_a_rank_that_waits_for_data_is_named() -> None:
    found = slow_ranks([times(0.3), times(0.3, wait=0.4)], 1.5)
    assert list(found) == [1]
    assert "waits for data for 40% of the time" in found[1]
    everybody = slow_ranks([times(0.3, wait=0.4), times(0.3, wait=0.4)], 1.5)
    assert "the ranks wait for data for 40% of the time" in everybody[0]


class Slow(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


def test_fetches_are_timed_and_iterators_end_when_nobody_holds_them() -> None:
    loader: Any = DataLoader(Slow(), batch_size=2)
    plain = [batch.tolist() for batch in loader]
    seconds: list[float] = []
    time_fetches(loader, seconds.append)
    assert [batch.tolist() for batch in loader] == plain
    assert len(seconds) == 3  # and the end
    assert all(value >= 0.04 for value in seconds[:2])
    gc.disable()
    try:
        iterator = iter(loader)
        next(iterator)
        held = weakref.ref(iterator)
        del iterator
        assert held() is None
    finally:
        gc.enable()
    time_fetches([torch.zeros(1)], seconds.append)  # no DataLoader: left alone
