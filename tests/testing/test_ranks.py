"""What tests see of their ranks."""

import time

import pytest
import torch.distributed as dist

from llmtrain.testing.ranks import run_ranks


def rank_times(factor: int) -> int:
    return dist.get_rank() * factor


def second_fails() -> None:
    if dist.get_rank() == 1:
        raise KeyError("told to fail")
    time.sleep(120)  # not in a collective, where it would hear of it


def first_fails_in_the_middle() -> None:
    if dist.get_rank() == 0:
        raise KeyError("told to fail")
    dist.barrier()


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(rank_times, 3, 5) == [0, 5, 10]


def test_a_rank_that_fails_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*KeyError: 'told to fail'"):
        run_ranks(second_fails, 2)
    assert time.monotonic() - start < 60


def test_the_rank_that_failed_first_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 failed.*KeyError: 'told to fail'"):
        run_ranks(first_fails_in_the_middle, 2)
