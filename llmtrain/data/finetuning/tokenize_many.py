"""Many examples: a few are tokenized here, more of them by a process on each core."""

import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from llmtrain.conversations.messages import BadExample, Example
from llmtrain.cores import available_cores
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from llmtrain.data.finetuning.tokenize import TokenizedExample

Placed = tuple[str, Example | BadExample]
"""Where a row stands, and its example or what is wrong with it."""

_BATCH = 256
_HERE = 4096
"""Rows that are tokenized before other processes are started: that takes a second."""
_LOOK_AROUND = 0.5
"""Seconds after which a process looks whether it is still wanted."""
_MOST_PROCESSES = 32
"""Reading the rows, which is done here, keeps no more of them busy."""


class Tokenizes(Protocol):
    """What `ExampleTokenizer` does."""

    counts: Counter[str]

    def __call__(self, examples: Sequence[Example], /) -> "list[TokenizedExample | BadExample]": ...  # noqa: D102

    def identity(self) -> str: ...  # noqa: D102


def tokenized(
    examples: Iterator[Placed], tokenize: Tokenizes
) -> Iterator[tuple[list[Placed], "list[TokenizedExample | BadExample]", Counter[str]]]:
    """Tokenize rows in batches, in their order.

    Yields:
        A batch; what became of those of its rows that are examples; what the tokenizer noticed in them.

    Raises:
        UserError: a process was killed.
    """
    batches = iter(lambda: list(islice(examples, _BATCH)), [])
    for batch in islice(batches, _HERE // _BATCH):
        yield batch, *_work(tokenize, _good(batch))
    processes = min(available_cores(), _MOST_PROCESSES)
    next_one = next(batches, None)
    if next_one is None:
        return
    if processes == 1:
        yield next_one, *_work(tokenize, _good(next_one))
        for batch in batches:
            yield batch, *_work(tokenize, _good(batch))
        return
    # Forked, as a DataLoader's workers are: the tokenizer need not be loaded again.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=fork, initializer=_adopt, initargs=(tokenize, os.getpid())) as pool:
        waiting: deque[tuple[list[Placed], Future[tuple[list[TokenizedExample | BadExample], Counter[str]]]]] = deque()
        waiting.append((next_one, pool.submit(_work_there, _good(next_one))))
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_work_there, _good(batch))))
                if len(waiting) > 2 * processes:
                    first, future = waiting.popleft()
                    yield first, *future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, *future.result()
        except BrokenProcessPool as problem:
            raise UserError("a process that was tokenizing was killed: there may be too little memory") from problem
        finally:
            for _, future in waiting:
                future.cancel()


def _good(batch: list[Placed]) -> list[Example]:
    return [example for _, example in batch if not isinstance(example, BadExample)]


def _work(tokenize: Tokenizes, examples: list[Example]) -> "tuple[list[TokenizedExample | BadExample], Counter[str]]":
    before = tokenize.counts.copy()
    return tokenize(examples), tokenize.counts - before


_adopted: list[Tokenizes] = []


def _adopt(tokenize: Tokenizes, parent: int) -> None:
    """Called in a new process; nothing is sent to it."""
    _adopted[:] = [tokenize]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the one that started it was killed: the lock of the store would stay with it for ever."""
    while os.getppid() == parent:
        time.sleep(_LOOK_AROUND)
    os._exit(1)


def _work_there(examples: list[Example]) -> "tuple[list[TokenizedExample | BadExample], Counter[str]]":
    return _work(_adopted[0], examples)
