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
