"""Which rank computes slower than the others, and which one waits for data. Changes nothing that is computed."""

import socket
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch import nn

from llmtrain.training.environment import say
from llmtrain.training.watchdog_config import WatchdogConfig

_SAMPLED = 10
"""On a GPU, one step in so many is timed; the events cost a few microseconds a block."""
_MATTERS = 0.05
"""Share of a step that a slow rank must cost before it is named: two ranks that do almost nothing differ by chance."""
_WAITS = 0.2
"""Share of the time from which on waiting for data is named."""


@dataclass
class Times:
    """What one rank has measured since the last report, in seconds.

    Attributes:
        host: where it runs.
        steps: each step from its first wish for data to its end.
        waits: each step's wait for this rank's own data; no other rank is in it.
        computes: of the steps that were timed, the time in the blocks' forward; FSDP's collective calls are around it.
    """

    host: str = ""
    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    computes: list[float] = field(default_factory=list)

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data."""
        return sum(self.waits) / max(sum(self.steps), 1e-9)

    @property
    def compute(self) -> float:
        """Of the middle step; 0 where nothing was timed."""
        return statistics.median(self.computes) if self.computes else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def slow_ranks(times: Sequence[Times], factor: float) -> dict[int, str]:
    """Ranks that the others wait for, with a line that says why.

    Args:
        times: of all ranks, in order.
        factor: how many times longer than the median rank is slow.
    """
    p50 = percentile([step for rank in times for step in rank.steps], 0.5)
    # Of two ranks, the faster one is what the other is compared with.
    compute = statistics.median_low([rank.compute for rank in times])
    share = statistics.median_low([rank.wait_share for rank in times])
    found = {}
    for rank, mine in enumerate(times):
        if len(times) > 1 and mine.compute > factor * compute and mine.compute - compute > _MATTERS * p50:
            found[rank] = (
                f"slow        rank {rank} ({mine.host}) computes {mine.compute / max(compute, 1e-9):.1f}x longer than "
                f"the median rank (p50 {p50 * 1e3:,.0f} ms a step)"
            )
        elif mine.wait_share > _WAITS and mine.wait_share > factor * share:
            found[rank] = (
                f"slow        rank {rank} ({mine.host}) waits for data for {mine.wait_share:.0%} of the time, the "
                f"median rank for {share:.0%}"
            )
    if not found and share > _WAITS:
        found[0] = (
            f"slow        the ranks wait for data for {share:.0%} of the time (p50 {p50 * 1e3:,.0f} ms a step): more "
            "num_workers, or faster storage"
        )
    return found


class StepTimes(Callback):  # type: ignore[misc]
    """Measures each step on each rank; every `report_interval` steps the ranks compare.

    Args:
        config: the recipe's `watchdog`.
        blocks: the model's blocks, whose forward is timed.
    """

    def __init__(self, config: WatchdogConfig, blocks: Iterable[nn.Module]) -> None:
        self.config = config
        self.blocks = list(blocks)
        self.times = Times(socket.gethostname())
        self._hooks: list[Any] = []
        self._began: float | None = None
        self._waited = self._computed = self._entered = 0.0
        self._timing = False
        self._events: list[list[tuple[Any, Any]]] = []
        self._cuda = False
        self._known: set[int] = set()
        self._skip = True

    def fit_start(self, state: State, logger: Logger) -> None:
        # Now, and not before: FSDP's own hooks are set, and these lie inside of them.
        self._cuda = state.device.name == "gpu"
        for block in self.blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enter))
            self._hooks.append(block.register_forward_hook(self._leave, prepend=True))
        time_fetches(state.train_dataloader, self._add_wait)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._began = time.monotonic()
        self._waited = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        self._computed = 0.0
        self._timing = not self._cuda or int(state.timestamp.batch) % _SAMPLED == 0
        if self._cuda and self._timing:
            self._events.append([])

    def batch_end(self, state: State, logger: Logger) -> None:
        timed, self._timing = self._timing, False
        if self._skip or self._began is None:
            self._skip = False  # the first step of a process compiles, allocates, starts workers
            self._events.clear()
        else:
            self.times.steps.append(time.monotonic() - self._began)
            self.times.waits.append(self._waited)
            if timed and not self._cuda:
                self.times.computes.append(self._computed)
        step = int(state.timestamp.batch)
        if step % self.config.report_interval == 0:
            self._report(step, logger)

    def close(self, state: State, logger: Logger) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        if not self._timing or not torch.is_grad_enabled():
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events[-1].append((event, None))
        else:
            self._entered = time.monotonic()

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        if not self._timing or not torch.is_grad_enabled():
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events[-1][-1] = (self._events[-1][-1][0], event)
        else:
            self._computed += time.monotonic() - self._entered

    def _report(self, step: int, logger: Logger) -> None:
        for events in self._events:
            pairs = [(start, end) for start, end in events if end is not None]
            if pairs:
                pairs[-1][1].synchronize()
                self.times.computes.append(sum(start.elapsed_time(end) for start, end in pairs) / 1e3)
        self._events = []
        times: list[Times] = dist.all_gather_object(self.times)
        self.times = Times(self.times.host)
        steps = [value for rank in times for value in rank.steps]
        if not steps:
            return
        metrics = {f"time/step_p{share}": percentile(steps, share / 100) for share in (50, 90, 99)}
        logger.log_metrics({**metrics, "time/data_wait_share": max(rank.wait_share for rank in times)})
        found = slow_ranks(times, self.config.slow_factor)
        for rank, line in found.items():
            if rank not in self._known:  # once, as long as it stays slow
                say(f"{line}, steps up to {step}")
        self._known = set(found)


def time_fetches(loader: Any, add: Callable[[float], None]) -> None:
    """Has `add` called with the seconds that each fetch of a batch took in this process.

    Composer's events around a fetch include a collective call, in which a fast rank waits for the slowest.

    Args:
        loader: torch's DataLoader; anything else is left alone.
        add: what takes the seconds.
    """
    make = getattr(loader, "_get_iterator", None)
    if make is None or not hasattr(loader, "__dict__"):
        return

    def timed() -> Any:
        iterator = make()
        fetch, of = type(iterator)._next_data, weakref.ref(iterator)  # a cycle would keep workers alive

        def next_data() -> Any:
            began = time.monotonic()
            try:
                return fetch(of())
            finally:
                add(time.monotonic() - began)

        iterator._next_data = next_data
        return iterator

    loader._get_iterator = timed
