"""One start of a run: from its newest checkpoint to its end, or to where it is killed."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.certify.plan import Kind, Point
from llmtrain.certify.processes import Ranks
from llmtrain.training.step_record import PHASE, STEPS, VARIABLE, read_steps

PATIENCE = 300.0
"""Seconds without a step after which a run hangs."""
SHORTEST_POLL = 0.0005
GRACE = 0.5
"""Seconds that the other ranks live on when one was killed, and after SIGTERM."""


@dataclass(frozen=True)
class Kill:
    """What was killed, as the disk showed it afterwards.

    Attributes:
        kind: inside of what.
        planned: what the plan had asked for.
        detail: more about it.
        began: the step that the run had gone on from; None where it was killed before it knew.
        step: last finished step.
        rank: the only one that was killed; None for all.
        ranks: of the run then.
    """

    kind: Kind
    planned: Kind
    detail: str
    began: int | None
    step: int
    rank: int | None
    ranks: int


@dataclass(frozen=True)
class Segment:
    """A start of a run, over.

    Attributes:
        began: the step that it went on from; None when it was over before it knew.
        rows: of the step record, those that it made itself.
        kill: how it was killed; None when it ended by itself.
        codes: exit codes of the ranks.
        output: what they printed.
    """

    ranks: int
    began: int | None
    rows: list[dict[str, Any]]
    kill: Kill | None
    codes: tuple[int | None, ...]
    output: str

    @property
    def failed(self) -> bool:
        """It ended by itself, and not well."""
        return self.kill is None and any(self.codes)


@dataclass
class Timing:
    """How long things take on this machine, as seen so far, in seconds."""

    start: float = 5.0
    step: float = 0.1
    evaluation: float = 0.3


@dataclass
class Starter:
    """Starts a run and watches it.

    Args:
        recipe: its recipe.
        run: its folder.
        cwd: working directory.
        environment: variables of the ranks.
        logs: folder for what they print.
        timing: learns from each start.
        tick: called often, with the last finished step.
    """

    recipe: Path
    run: Path
    cwd: Path
    environment: dict[str, str]
    logs: Path
    timing: Timing
    tick: Callable[[int], None] = lambda step: None
    started: int = field(default=0, init=False)

    def start(self, ranks: int, choose: Callable[[int, int], Point | None], overrides: Sequence[str] = ()) -> Segment:
        """Start the run and kill it where `choose` says.

        Args:
            ranks: number of processes.
            choose: gives the point; told from which step the run will go on, as far as that can be seen, and the ranks.
            overrides: `key=value`.
        """
        self.started += 1
        log = self.logs / f"{self.run.name}-{self.started}.log"
        (self.run / PHASE).unlink(missing_ok=True)
        point = choose(newest_step(self.run), ranks)
        environment = {**self.environment, VARIABLE: "1"}
        processes = Ranks([str(self.recipe), *overrides], ranks, cwd=self.cwd, log=log, environment=environment)
        try:
            watch = _Watch(self.run, processes, self.timing, self.tick)
            killed = point is not None and watch.until(point)
            if killed and point is not None:
                _kill(processes, point.rank)
                watch.look()
                # It may have ended by itself in this very moment; a crash of its own must not pass for a kill.
                killed = -signal.SIGKILL in processes.codes
            else:
                watch.until_end()
            kill = _seen(self.run, point, watch, ranks) if killed and point is not None else None
        finally:
            processes.kill()
        began = watch.began
        rows = [] if began is None else [row for row in read_steps(self.run / STEPS) if row["step"] > began]
        output = log.read_text(errors="replace") if log.exists() else ""
        return Segment(ranks, began, rows, kill, processes.codes, output)


class _Watch:
    """Follows a run through the files that it writes."""

    def __init__(self, run: Path, processes: Ranks, timing: Timing, tick: Callable[[int], None]) -> None:
        self.run = run
        self.processes = processes
        self.timing = timing
        self.tick = tick
        self.phase = "starting"
        self.began: int | None = None
        self.step = newest_step(run)
        self._start = self._moved = time.monotonic()
        self._seen: tuple[int, int] | None = None
        self._evaluating: float | None = None

    def until(self, point: Point) -> bool:
        """Whether the point came; otherwise the run ended before it."""
        if point.kind == "start":
            return self._wait(lambda: time.monotonic() - self._start >= point.moment * self.timing.start)
        if not self._wait(lambda: self.phase in ("training", "evaluation") and self.step >= point.after):
            return False
        if point.kind == "step":
            reached = time.monotonic()
            return self._wait(lambda: time.monotonic() - reached >= point.moment * self.timing.step)
        if point.kind == "evaluation":
            if not self._wait(lambda: self.phase == "evaluation"):
                return False
            reached = time.monotonic()
            return self._wait(lambda: time.monotonic() - reached >= point.moment * self.timing.evaluation)
        if not self._wait(lambda: _stage(self.run) in _BEHIND[point.stage], SHORTEST_POLL):
            return False
        if point.stage == "later":
            time.sleep(0.02 * point.moment)
        return True

    def until_end(self) -> None:
        """Returns when no rank is left; where one fails, the others are ended."""
        failed: float | None = None
        while self.processes.alive:
            self.look()
            if failed is None and any(code for code in self.processes.codes):
                failed = time.monotonic()
            if self._hangs() or (failed is not None and time.monotonic() - failed > 30):
                self.processes.kill()
            time.sleep(0.01)
        self.look()

    def _wait(self, condition: Callable[[], bool], poll: float = 0.003) -> bool:
        while True:
            self.look()
            if condition():
                return True
            if self._hangs() or any(code is not None for code in self.processes.codes):
                return False
            time.sleep(poll)

    def _hangs(self) -> bool:
        return time.monotonic() - self._moved > PATIENCE

    def look(self) -> None:
        """Reads what the run has written since."""
        now = time.monotonic()
        self._look_at_phase(now)
        if self.began is None:
            return
        try:
            status = (self.run / STEPS).stat()
        except OSError:
            return
        if self._seen != (seen := (status.st_ino, status.st_size)):
            self._seen = seen
            rows = read_steps(self.run / STEPS)
            step = max((int(row["step"]) for row in rows), default=0)
            if step > self.step:
                if self.step > self.began:
                    self.timing.step = now - self._moved
                self.step, self._moved = step, now
        self.tick(self.step)

    def _look_at_phase(self, now: float) -> None:
        try:
            phase, began = (self.run / PHASE).read_text().split()
        except (OSError, ValueError):
            return
        if self.began is None:
            self.began = self.step = int(began)
        if phase == self.phase:
            return
        self._moved = now
        if self.phase in ("starting", "loaded") and phase in ("training", "evaluation"):
            self.timing.start = now - self._start
        if phase == "evaluation":
            self._evaluating = now
        elif self._evaluating is not None:
            self.timing.evaluation, self._evaluating = now - self._evaluating, None
        self.phase = phase


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint that has its name; 0 where there is none."""
    names = [path.name for path in (run / "checkpoints").glob("ep*-ba*")]
    return max((int(name.rpartition("-ba")[2]) for name in names), default=0)


_BEHIND = {
    "begun": ("begun", "files", "manifest"),
    "files": ("files", "manifest"),
    "manifest": ("manifest",),
    "later": ("begun", "files", "manifest"),
}


def _stage(run: Path) -> str | None:
    """How far the save has come that is going on; None where there is none."""
    files: set[str] = set()
    found = False
    try:
        for folder in (run / "checkpoints/.saving").iterdir():
            if folder.is_dir() and folder.name.startswith("ep"):
                found = True
                files |= {file.name for file in folder.iterdir()}
    except OSError:  # it was renamed just now
        pass
    if not found:
        return None
    return "manifest" if any("manifest" in name for name in files) else "files" if files else "begun"


def _kill(processes: Ranks, rank: int | None) -> None:
    """SIGKILL for all ranks, or for one, and then the others are ended as a launcher ends them."""
    if rank is not None:
        processes.send(signal.SIGKILL, [rank])
        for signum in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE
            while processes.alive and time.monotonic() < deadline:
                time.sleep(0.01)
            processes.send(signum)
    processes.kill()


def _seen(run: Path, point: Point, watch: _Watch, ranks: int) -> Kill:
    """What the kill hit, by what it left."""
    stage = _stage(run)
    kind: Kind
    if watch.phase in ("starting", "loaded"):  # what lies half-written there was left by an earlier start
        kind, detail = "start", "before it knew where it goes on" if watch.began is None else "checkpoint loaded"
    elif stage is not None:
        kind, detail = "save", _DETAILS[stage]
    elif watch.phase == "evaluation":
        kind, detail = "evaluation", f"after step {watch.step}"
    else:
        kind, detail = "step", f"step {watch.step + 1}"
    return Kill(kind, point.kind, detail, watch.began, watch.step, point.rank, ranks)


_DETAILS = {
    "begun": "folder made, no file yet",
    "files": "some files written, no manifest",
    "manifest": "manifest begun, before the rename",
}
