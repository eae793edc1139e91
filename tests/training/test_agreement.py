import time
from datetime import timedelta

import torch.distributed as dist

from llmtrain.errors import UserError
from llmtrain.testing.ranks import run_ranks


def agree() -> list[object]:
    from llmtrain.training.agreement import from_all_ranks, from_rank_zero

    rank = dist.get_rank()

    def fail() -> int:
        raise PermissionError(f"no access on {rank}")

    def fail_on_one() -> int:
        return rank if rank == 0 else fail()

    seen: list[object] = [from_rank_zero(lambda: {"rank": rank}), from_all_ranks(lambda: rank * 10)]
    for call in (lambda: from_rank_zero(fail), lambda: from_all_ranks(fail_on_one)):
        try:
            seen.append(call())
        except UserError as error:
            seen.append(str(error))
    return seen


def test_all_ranks_get_the_same_answers_and_the_same_errors() -> None:
    first, second = run_ranks(agree, 2)
    assert first == second
    assert first == [
        {"rank": 0},
        [0, 10],
        "PermissionError: no access on 0",
        "rank 1: PermissionError: no access on 1",
    ]


def wait_longer_than_a_collective_may() -> list[object]:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from llmtrain.training.agreement import from_rank_zero_in_turns

    _set_pg_timeout(timedelta(seconds=1))

    def slow() -> str:
        time.sleep(2)
        return f"from {dist.get_rank()}"

    def slow_failure() -> str:
        raise PermissionError(slow())

    seen: list[object] = [from_rank_zero_in_turns(slow, 0.2)]
    try:
        from_rank_zero_in_turns(slow_failure, 0.2)
    except UserError as error:
        seen.append(str(error))
    return seen


def test_what_takes_longer_than_a_collective_call_may() -> None:
    first, second = run_ranks(wait_longer_than_a_collective_may, 2)
    assert first == second == ["from 0", "PermissionError: from 0"]
