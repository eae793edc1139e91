"""Work that one rank of a machine does while the others wait, for longer than a collective call may take.

The others look for what it leaves on disk: a finished folder, or a file that says why there is none.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist

from llmtrain.errors import UserError

T = TypeVar("T")

_LONGEST_NAP = 0.5


@dataclass(frozen=True)
class Place:
    """Which rank this process is. From torch.distributed where it is set up, else from the launcher's variables."""

    rank: int
    ranks: int
    local_rank: int

    @classmethod
    def detect(cls) -> "Place":
        """Ask for this process."""
        connected = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if connected else int(os.environ.get("RANK", 0))
        ranks = dist.get_world_size() if connected else int(os.environ.get("WORLD_SIZE", 1))
        return cls(rank, ranks, int(os.environ.get("LOCAL_RANK", 0)))

    def in_group(self, degree: int) -> "Place":
        """The place among groups of `degree` consecutive ranks, which act as one (and lead no machine)."""
        return Place(self.rank // degree, self.ranks // degree, self.local_rank)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that works for its machine."""
        return self.local_rank == 0


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order (a collective call where there are several)."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def from_leader(function: Callable[[], T]) -> T:
    """Call `function` on the first rank of each machine; each rank gets the result of its own (a collective call).

    Raises:
        UserError: on all ranks, with what the first failing one raised.
    """
    place, value, error = Place.detect(), None, None
    if place.leads:
        try:
            value = function()
        except UserError as problem:
            error = str(problem)
    answers = gather((value, error))
    for _, text in answers:
        if text is not None:
            raise UserError(text)
    result: Any = answers[place.rank - place.local_rank if len(answers) > 1 else 0][0]
    return result  # type: ignore[no-any-return]


def made_by_leader(folders: list[Path], make: Callable[[], None]) -> None:
    """Return when all of `folders` are there: the first rank of each machine makes them (a collective call).

    Raises:
        UserError: on all ranks of the machine, with what it raised.
    """
    place = Place.detect()
    names = gather(uuid.uuid4().hex)  # of this attempt: the reason of an earlier one must not be taken for its own
    name = names[place.rank - place.local_rank if len(names) > 1 else 0]
    failed = folders[0].parent / f".failed-{name}.json"
    if place.leads:
        try:
            make()
        except Exception as problem:
            kind = "" if isinstance(problem, UserError) else f"{type(problem).__name__}: "
            with contextlib.suppress(OSError):
                if place.ranks > 1:
                    temporary = failed.with_suffix(".tmp")
                    temporary.write_text(json.dumps(f"{kind}{problem}"), encoding="utf-8")
                    temporary.replace(failed)
            raise
        return
    nap = 0.01
    while not all(folder.is_dir() for folder in folders):
        if failed.is_file():
            reason = json.loads(failed.read_text(encoding="utf-8"))
            raise UserError(reason)
        time.sleep(nap)
        nap = min(nap * 1.5, _LONGEST_NAP)
