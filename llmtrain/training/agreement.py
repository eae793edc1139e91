"""All ranks come to the same answer, or to the same error: one that fails alone leaves the others waiting for it."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.utils import dist

from llmtrain.errors import UserError

T = TypeVar("T")

after_each_turn: list[Callable[[], None]] = []
"""Called in long waits whenever the ranks have answered each other: who looks for hangs learns that this is none."""

around_each_exchange: list[Callable[[bool], None]] = []
"""Called before (True) and after (False) the ranks exchange a few numbers. Nobody works meanwhile: where all have come
and all of them wait, it is for the network."""


def gets_on() -> None:
    """Said where a rank works for long without the others: it is not what a hang looks like."""
    for tell in after_each_turn:
        tell()


def exchange(numbers: torch.Tensor, operation: str, *, wait: bool = True) -> None:
    """All-reduces a few numbers in place, once in each step: cheap, but a network that is cut may stop a run here.

    Args:
        numbers: on the device of the run.
        operation: `MAX`, `SUM`, ...
        wait: until the result is there; without it a GPU's may come later.
    """
    for tell in around_each_exchange:
        tell(True)
    dist.all_reduce(numbers, reduce_operation=operation)
    if wait:
        numbers.cpu()
    for tell in around_each_exchange:
        tell(False)


def from_rank_zero(function: Callable[[], T], group: Any = None) -> T:
    """Calls `function` on rank 0 and returns its result on all ranks (a collective call).

    Args:
        function: what rank 0 does.
        group: a process group of all ranks; the default one when left out. A thread beside the one that trains needs
            a group of its own.

    Raises:
        UserError: on all ranks, with what rank 0 raised.
    """
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = _text(error)
    dist.broadcast_object_list(answer, group=group)
    if answer[1] is not None:
        raise _agreed(answer[1])
    result: T = answer[0]
    return result


def from_rank_zero_in_turns(function: Callable[[], T], turn: float = 5.0) -> T:
    """The same for what may take longer than a collective call may (`dist_timeout`): a server that does not answer.

    Args:
        function: runs in a thread on rank 0.
        turn: seconds between the collective calls in which the ranks wait.

    Raises:
        UserError: on all ranks, with what rank 0 raised.
    """
    answer: list[Any] = [None, None]

    def work() -> None:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = _text(error)

    thread = threading.Thread(target=work, daemon=True)
    if dist.get_global_rank() == 0:
        thread.start()
    ended = [False]
    while not ended[0]:
        if dist.get_global_rank() == 0:
            thread.join(turn)
            ended = [not thread.is_alive()]
        dist.broadcast_object_list(ended)
        for tell in after_each_turn:
            tell()

    def outcome() -> T:
        if answer[1] is not None:
            raise _agreed(answer[1])
        result: T = answer[0]
        return result

    return from_rank_zero(outcome)


def from_all_ranks(function: Callable[[], T], group: Any = None) -> list[T]:
    """Calls `function` on each rank and returns all results in the order of ranks (a collective call).

    Args:
        function: what each rank does.
        group: as for :func:`from_rank_zero`.

    Raises:
        UserError: on all ranks, with what the first failing rank raised.
    """
    value, error = None, None
    try:
        value = function()
    except Exception as problem:
        error = _text(problem)
    answers = dist.all_gather_object((value, error), group)
    for rank, (_, text) in enumerate(answers):
        if text is not None:
            raise _agreed(text if rank == 0 else f"rank {rank}: {text}")
    return [answer for answer, _ in answers]


def from_all_ranks_in_turns(function: Callable[[], T], turn: float = 5.0) -> list[T]:
    """`from_all_ranks` for what may take longer than a collective call may (`dist_timeout`).

    Args:
        function: runs in a thread on each rank.
        turn: seconds between the collective calls in which the ranks wait.

    Raises:
        UserError: on all ranks, with what the first failing rank raised.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    while not all(dist.all_gather_object(not thread.is_alive())):
        for tell in after_each_turn:
            tell()
        thread.join(turn)

    def outcome() -> T:
        if errors:
            raise errors[0]
        return results[0]

    return from_all_ranks(outcome)


def _agreed(text: str) -> UserError:
    error = UserError(text)
    error.agreed = True
    return error


def _text(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}"
