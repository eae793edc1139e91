"""All ranks come to the same answer, or to the same error: one that fails alone leaves the others waiting for it."""

from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

from llmtrain.errors import UserError

T = TypeVar("T")


def from_rank_zero(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result on all ranks (a collective call).

    Raises:
        UserError: on all ranks, with what rank 0 raised.
    """
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = _text(error)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    result: T = answer[0]
    return result


def from_all_ranks(function: Callable[[], T]) -> list[T]:
    """Calls `function` on each rank and returns all results in the order of ranks (a collective call).

    Raises:
        UserError: on all ranks, with what the first failing rank raised.
    """
    value, error = None, None
    try:
        value = function()
    except Exception as problem:
        error = _text(problem)
    answers = dist.all_gather_object((value, error))
    for rank, (_, text) in enumerate(answers):
        if text is not None:
            raise UserError(text if rank == 0 else f"rank {rank}: {text}")
    return [answer for answer, _ in answers]


def _text(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}"
