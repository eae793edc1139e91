"""A thread in each rank that notices when the run stands still, finds out for whom it waits, says so and ends it.

It goes by the monotonic clock, so a clock that is set does not matter; and time in which this process did not run at
all (it was stopped, or the machine slept) is not counted.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from llmtrain.training import stacks
from llmtrain.training.exit_codes import LOST_CONTACT, POINTLESS, PREEMPTED
from llmtrain.training.hang_report import Seen, State, hang_message
from llmtrain.training.heartbeat import Beat, Heartbeats, process_state
from llmtrain.training.step_limits import StepLimits, Work

AGAIN = "The same command goes on from the newest checkpoint."
_LOOK_AFTER = 5.0
"""Seconds without progress after which a rank looks at the others."""
_FOLLOW_AFTER = 5.0
"""Seconds that the main thread has to notice by itself that a peer is gone."""
_COLLECT = 4.0
"""Seconds that ranks have to write their stacks when one of them calls it a hang."""
_LEAVE_WITHIN = 45.0
"""Seconds to finish a step and save it when the launcher is gone."""
_SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "ash", "tcsh", "busybox", "tmux", "screen", "sshd")


class Watchdog:
    """One for each process; it outlives a trainer that is put together anew.

    Args:
        hearts: where ranks tell where they are, or None when they see no folder in common.
        run: the run's folder.
        limits: how long is too long.
        rank: this one.
        world: number of ranks.
        heart_limit: seconds without a sign of life after which a peer counts as lost.
        ends: whether this process is a rank and nothing else, so that it may be ended.
    """

    def __init__(
        self,
        hearts: Heartbeats | None,
        run: Path,
        limits: StepLimits,
        *,
        rank: int,
        world: int,
        heart_limit: float,
        ends: bool,
    ) -> None:
        self.hearts, self.run, self.limits = hearts, run, limits
        self.rank, self.world, self.heart_limit, self.ends = rank, world, heart_limit, ends
        # With 512 ranks a shared folder should not get 512 renames a second.
        self.interval = min(10.0, max(1.0, world / 64))
        self.ending = threading.Event()
        self._beat = Beat.of_this_process(rank)
        self._work: Work = "other"
        self._since = time.monotonic()
        self._peers: dict[int, tuple[Beat, float]] = {}
        self._lost_at: float | None = None
        self._parent, self._leave_at = _launcher(), float("inf")
        self._lock = threading.Lock()  # of the beat, which both threads change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)

    def start(self) -> None:
        """From now on; SIGUSR1 prints stacks."""
        stacks.show_on_signal()
        self._tell()
        self._thread.start()

    # What the main thread tells.

    def begins(self, phase: str, work: Work = "other") -> None:
        """Something is begun, so what was before is done."""
        with self._lock:
            self._work, self._since = work, time.monotonic()
            self._beat = self._beat.next(phase=phase)

    def turned(self) -> None:
        """The ranks wait for something slow, and have just answered each other."""
        with self._lock:
            self._work, self._since = "other", time.monotonic()

    def finished(self, work: Work, seconds: float) -> None:
        """A step (or a batch of an evaluation) took so long."""
        self.limits.finished(work, seconds)

    def at_step(self, step: int) -> None:
        """The last finished step."""
        with self._lock:
            self._beat = self._beat.next(step=step)

    @property
    def step(self) -> int:
        """The last finished step."""
        return self._beat.step

    @property
    def name(self) -> str:
        """Of this rank, and its host."""
        return self._beat.name

    def failed(self, cause: str, code: int) -> None:
        """This rank fails by itself; the others are told at once."""
        self._tell(failure=cause, code=code, ended="failed")

    def followed(self) -> None:
        """This rank ends because another one did."""
        self._tell(ended="followed")

    def stop(self) -> None:
        """The end of a run that went well: nothing is left behind."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)
        if self.hearts is not None and not self._beat.ended:
            self.hearts.remove(self.rank)

    def first_cause(self, patience: float = 6.0) -> tuple[Seen | None, list[Seen]]:
        """Which peer failed, or is gone: for the main thread, when a collective call has failed.

        Args:
            patience: seconds to wait for a peer to say so; it may be writing its traceback.

        Returns:
            The peer (None where all seem to be well), and all ranks.
        """
        until = time.monotonic() + patience
        while True:
            ranks = self.look()
            own_words = [seen for seen in ranks if seen.beat.failure and seen.beat.rank != self.rank]
            if own_words:
                return min(own_words, key=lambda seen: seen.beat.wall), ranks
            if hung := [seen for seen in ranks if seen.beat.hang and seen.beat.rank != self.rank]:
                return hung[0], ranks
            lost = [seen for seen in ranks if seen.state in ("gone", "stopped")]
            lost = lost or [seen for seen in ranks if seen.state == "silent"]
            if lost and time.monotonic() > until - patience / 2:
                return lost[0], ranks
            if time.monotonic() > until:
                silent = [seen for seen in ranks if seen.silent > 2 * self.interval + 1 and not seen.beat.ended]
                return (max(silent, key=lambda seen: seen.silent) if silent else None), ranks
            time.sleep(0.2)

    def speaks(self, ranks: list[Seen]) -> bool:
        """Whether this rank is the one that tells the user: the lowest that is left."""
        left = [
            seen.beat.rank
            for seen in ranks
            if seen.beat.ended == "followed" or (seen.state == "alive" and seen.beat.ended != "failed")
        ]
        return self.rank <= min([*left, self.rank])

    # The thread.

    def _loop(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if (gap := now - last - self.interval) > 2:
                self._forgive(gap)
            last = now
            try:
                self._tick(now)
            except Exception as error:  # the run is worth more than its watchdog
                print(f"warning: watchdog of rank {self.rank}: {error!r}", file=sys.stderr, flush=True)

    def _forgive(self, gap: float) -> None:
        """This process did not run for a while; neither it nor what it knows of others has become older."""
        self._since += gap
        self._peers = {rank: (beat, seen + gap) for rank, (beat, seen) in self._peers.items()}

    def _tick(self, now: float) -> None:
        waited = now - self._since
        place = stacks.main_place() if waited > _LOOK_AFTER else stacks.Place("code", "")
        self._tell(since=round(waited, 1), kind=place.kind if place.text else "", place=place.text)
        self._mind_the_launcher(now)
        if waited < _LOOK_AFTER or self.ending.is_set() or self._beat.ended:
            self._lost_at = None
            return
        ranks = self.look()
        if self._over(ranks, now):
            self._follow(ranks)
        if any(seen.beat.hang and seen.beat.rank != self.rank for seen in ranks):
            self._hang(waited)
        limit = self.limits.limit(self._work)
        lost = [seen for seen in ranks if seen.state in ("silent", "stopped") and seen.silent > self.heart_limit]
        if waited > limit or (lost and waited > self.heart_limit):
            self._hang(waited)

    def _over(self, ranks: list[Seen], now: float) -> bool:
        """Whether a peer has ended, and the main thread had time to notice."""
        if not any(seen.beat.rank != self.rank and (seen.beat.failure or seen.state == "gone") for seen in ranks):
            self._lost_at = None
            return False
        self._lost_at = self._lost_at or now
        return now - self._lost_at > _FOLLOW_AFTER

    def look(self) -> list[Seen]:
        """All ranks that are heard of, as they are now, in order."""
        now = time.monotonic()
        found = [Seen(self._beat, 0.0, "alive")]
        for rank in range(self.world):
            if rank == self.rank or self.hearts is None:
                continue
            beat, (known, since) = self.hearts.read(rank), self._peers.get(rank, (None, now))
            if beat is None and known is None:
                continue  # not heard of yet
            if beat is None or (known is not None and beat.count == known.count and beat.pid == known.pid):
                gone_well = beat is None  # it took its file with it
                beat = known
            else:
                gone_well, since = False, now
            assert beat is not None
            self._peers[rank] = (beat, since)
            found.append(Seen(beat, now - since, self._state(beat, now - since, gone_well)))
        return sorted(found, key=lambda seen: seen.beat.rank)

    def _state(self, beat: Beat, silent: float, gone_well: bool) -> State:
        if gone_well:
            return "finished"
        process = process_state(beat)
        if process == "gone":
            return "finished" if beat.ended == "followed" or beat.hang else "gone"
        if process == "stopped" and silent > 2 * self.interval:
            return "stopped"
        return "silent" if silent > self.heart_limit else "alive"

    def _mind_the_launcher(self, now: float) -> None:
        """A launcher that was killed leaves its ranks behind; they save and end."""
        if self._parent is not None and os.getppid() != self._parent:
            print(
                f"launcher    of rank {self.rank} is gone (pid {self._parent}): the run saves after this step and ends",
                file=sys.stderr,
                flush=True,
            )
            self._parent, self._leave_at = None, now + _LEAVE_WITHIN
            if self.ends:
                os.kill(os.getpid(), signal.SIGTERM)
        elif now > self._leave_at:
            self._end(PREEMPTED)

    def _follow(self, ranks: list[Seen]) -> None:
        """A peer has ended, and the main thread is stuck in a call that does not notice (NCCL, a data worker)."""
        self.ending.set()
        message, code = following(self, *self.first_cause(0.0))
        with suppress(OSError):
            stacks.dump(self.run / "hang" / f"rank-{self.rank}.txt")
        self.followed()
        if message:
            print(message, file=sys.stderr, flush=True)
        self._end(code)

    def _hang(self, waited: float) -> None:
        self.ending.set()
        limit = min(self.limits.limit(self._work), self.heart_limit if waited > self.heart_limit else float("inf"))
        with suppress(OSError):
            stacks.dump(self.run / "hang" / f"rank-{self.rank}.txt")
        place = stacks.main_place()
        self._tell(since=round(waited, 1), kind=place.kind, place=place.text, hang=True)
        began = time.monotonic()
        while True:
            ranks = self.look()
            others = [seen for seen in ranks if seen.beat.rank != self.rank and seen.state == "alive"]
            lower = [seen for seen in others if seen.beat.rank < self.rank]
            if any(seen.beat.reported for seen in ranks):
                break
            seconds = time.monotonic() - began
            if (not lower and (seconds > _COLLECT or all(seen.beat.hang for seen in others))) or seconds > 3 * _COLLECT:
                self._report(ranks, waited, limit)
                break
            time.sleep(0.2)
            self._tell()
        self._end(LOST_CONTACT)

    def _report(self, ranks: list[Seen], waited: float, limit: float) -> None:
        advice = AGAIN if self.ends else "The run was left as it is."
        text = hang_message(ranks, waited=waited, limit=limit, stacks=f"{self.run}/hang/rank-*.txt", advice=advice)
        print(text, file=sys.stderr, flush=True)
        with suppress(OSError):
            (self.run / "hang" / "report.txt").write_text(text + "\n")
        self._tell(reported=True)

    def _tell(self, **changes: Any) -> None:
        with self._lock:
            self._beat = self._beat.next(**changes)
            if self.hearts is not None:
                self.hearts.write(self._beat)

    def _end(self, code: int) -> None:
        """Ends this process from its side thread: the main thread may be where no exception gets to."""
        if self.ends:
            end_now(code)
        self._stop.set()


def following(watchdog: Watchdog, first: Seen | None, ranks: list[Seen]) -> tuple[str, int]:
    """What a rank says that ends because another one did, and its exit code.

    Args:
        watchdog: of this rank.
        first: the rank that ended first.
        ranks: all of them.

    Returns:
        Nothing to say where another rank says it.
    """
    step = max([watchdog.step, *(seen.beat.step for seen in ranks)])
    code = first.beat.code if first is not None and first.beat.code in POINTLESS else LOST_CONTACT
    if not watchdog.speaks(ranks) or (first is not None and first.beat.hang):
        return "", code
    if first is None:
        who = f"rank {watchdog.rank}"
        return f"error ({who}, after step {step}): lost contact to the other ranks. {AGAIN}", code
    if first.beat.failure:
        return f"ended       after step {step}, because rank {first.beat.rank} failed: {first.beat.failure}", code
    return (
        f"error (rank {first.beat.rank}, after step {step}): {first.beat.name}: {first.condition()}. It was ended from "
        f"outside, often because the host ran out of memory (dmesg tells), or its host is gone. {AGAIN}",
        code,
    )


def end_now(code: int) -> NoReturn:
    """Leaves without waiting for anybody; takes the node's temporary folder along."""
    folder = tempfile.tempdir
    if folder and os.environ.get("LOCAL_RANK", "0") == "0" and Path(folder).name.startswith("llmtrain-"):
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launcher() -> int | None:
    """The process that started this rank, if its end means that the run shall end; a shell's does not (nohup)."""
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ or os.getppid() <= 1:
        return None
    try:
        name = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        return None
    return None if name.lstrip("-") in _SHELLS else os.getppid()
