"""The processes that share an evaluation: started by torchrun or Composer's launcher, or one alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llmtrain.cores import threads_of_a_rank
from llmtrain.errors import UserError

T = TypeVar("T")

TIMEOUT = 1800.0
"""Seconds that a rank waits for the others: tasks take longer on one rank than on another."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation."""

    rank: int = 0
    """Which of them it is."""
    world: int = 1
    """How many they are."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where its model is."""
    started_here: bool = False
    """Whether `close` ends the process group."""

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def deal(self, n: int) -> range:
        """Which of n items are this rank's: rank, rank + world, ..."""
        return range(self.rank, n, self.world)

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, on each of them, in the order of the whole.

        Args:
            items: one for each number that `deal` gave this rank, in its order. They are pickled: keep them small.
        """
        if self.world == 1:
            return list(items)
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, list(items))
        total = sum(len(part) for part in parts)
        return [parts[i % self.world][i // self.world] for i in range(total)]

    def gather_each(self, item: T) -> list[T]:
        """One thing of each rank, on each of them, by rank. It is pickled."""
        if self.world == 1:
            return [item]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, item)
        return parts

    def rounds(self, n_mine: int) -> int:
        """The largest `n_mine` of all ranks: sharded ranks make equally many forwards, or they wait for ever."""
        return max(self.gather_each(n_mine))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, on the CPU: added in the order of the ranks, so equal on all of them."""
        parts = self.gather_each(values.detach().cpu())
        total = torch.zeros_like(parts[0])
        for part in parts:
            total += part
        return total

    def close(self) -> None:
        """Wait for the others and leave the group, where `start` made it."""
        if self.started_here and dist.is_initialized():
            dist.destroy_process_group()


def start(device: str | None = None, timeout: float = TIMEOUT) -> Ranks:
    """Join the processes that torchrun or Composer's launcher started; without a launcher there is one.

    Args:
        device: `cpu`, `cuda` (with a launcher, the GPU of the local rank), `cuda:1`; a GPU if there is one.
        timeout: seconds that a rank waits for the others.

    Raises:
        UserError: this machine has no such device, or fewer GPUs than ranks.
    """
    from llmtrain.generation.load import check_device

    mine = not dist.is_initialized()
    world = int(os.environ.get("WORLD_SIZE", "1")) if mine else dist.get_world_size()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1 and wanted == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', world)} ranks on this machine, and torch sees "
                f"{torch.cuda.device_count()} GPUs: start one rank a GPU, or pass --device cpu"
            )
        wanted = f"cuda:{local}"
    check_device(wanted)
    place = torch.device(wanted)
    if world == 1:
        return Ranks(device=place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        threads = threads_of_a_rank(int(os.environ.get("LOCAL_WORLD_SIZE", str(world))))
        if threads is not None:
            torch.set_num_threads(threads)
    if mine:
        # gloo beside nccl: objects are gathered on the CPU, and small sums too
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return Ranks(dist.get_rank(), dist.get_world_size(), place, started_here=mine)
