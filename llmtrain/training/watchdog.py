"""A thread in each rank that notices when the run stands still, finds out for whom it waits, says so and ends it.

It goes by the monotonic clock, so a clock that is set does not matter; and time in which this process did not run at
all (it was stopped, or the machine slept) is not counted.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.training import stacks
from llmtrain.training.exit_codes import LOST_CONTACT, POINTLESS, PREEMPTED
from llmtrain.training.hang_report import Seen, State, hang_message
from llmtrain.training.heartbeat import Beat, Heartbeats, process_state
from llmtrain.training.rank_process import end_now, launcher
from llmtrain.training.step_limits import StepLimits, Work

AGAIN = "The same command goes on from the newest checkpoint."
_EXCHANGE = ": ranks exchange numbers"
_LOOK_AFTER = 5.0
"""Seconds without progress after which a rank looks at the others."""
_FOLLOW_AFTER = 5.0
"""Seconds that the main thread has to notice by itself that a peer is gone."""
_COLLECT = 4.0
"""Seconds that ranks have to write their stacks when one of them calls it a hang."""
_LEAVE_WITHIN = 45.0
"""Seconds to finish a step and save it when the launcher is gone."""


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
        near: ranks that are looked at while all seems well; all of them when left out. With a thousand ranks that each
            read a thousand files, the folder's server would have nothing else to do.
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
        near: range | None = None,
    ) -> None:
        self.hearts, self.run, self.limits = hearts, run, limits
        self.rank, self.world, self.ends = rank, world, ends
        # With 512 ranks a shared folder should not get 512 renames a second.
        self.interval = min(10.0, max(1.0, world / 64))
        self.heart_limit = max(heart_limit, 3 * self.interval)
        self.near = near or range(world)
        self.ending = threading.Event()
        self._beat = Beat.of_this_process(rank)
        self._work: Work = "other"
        self._of = ""
        self._exchanging = False
        self._since = time.monotonic()
        self._peers: dict[int, tuple[Beat, float]] = {}
        self._lost_at: float | None = None
        self._parent, self._leave_at = launcher(), float("inf")
        self._lock = threading.Lock()  # of the beat, which both threads change
        self._writing = threading.Lock()  # not that one: the training does not wait for a folder that is slow
        self._mute = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)

    def start(self) -> None:
        """From now on; SIGUSR1 prints stacks."""
        stacks.show_on_signal()
        self._tell()
        self._thread.start()

    # What the main thread tells.

    def begins(self, phase: str, work: Work = "other", of: str = "") -> None:
        """Something is begun, so what was before is done.

        Args:
            phase: for people.
            work: decides its limit.
            of: which evaluation: their batches have nothing in common.
        """
        with self._lock:
            self._work, self._of, self._since, self._exchanging = work, of, time.monotonic(), False
            self._beat = self._beat.next(phase=phase)

    def turned(self) -> None:
        """The ranks wait for something slow, and have just answered each other."""
        with self._lock:
            self._work, self._since = "other", time.monotonic()

    def exchanges(self, begins: bool) -> None:
        """The ranks exchange a few numbers, or have done so; what is going on apart from that stays the same."""
        with self._lock:
            self._exchanging, self._since = begins, time.monotonic()
            self._beat = self._beat.next(phase=self._beat.phase.removesuffix(_EXCHANGE) + (_EXCHANGE if begins else ""))

    def finished(self, work: Work, seconds: float, of: str = "") -> None:
        """A step (or a batch of an evaluation) took so long."""
        self.limits.finished(work, seconds, of)

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
                # Not for as long as heart_limit, but with the connection closed that is enough: its host is gone.
                ranks = [
                    replace(seen, state="silent")
                    if seen.silent > 2 * self.interval + 1 and not seen.beat.ended
                    else seen
                    for seen in ranks
                ]
                silent = [seen for seen in ranks if seen.state == "silent"]
                return max(silent, key=lambda seen: seen.silent, default=None), ranks
            time.sleep(self._pause)

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
        too_long = waited > (self.limits.limit("step") if self._exchanging else self.limits.limit(self._work, self._of))
        ranks = self.look(None if too_long else self.near)
        if self._over(ranks, now):
            self._follow(ranks)
        if any(seen.beat.hang and seen.beat.rank != self.rank for seen in ranks):
            self._hang(waited)
        if self._is_hang(ranks, waited) or (self._lost(ranks) and waited > self.heart_limit):
            self._hang(waited)

    def _is_hang(self, ranks: list[Seen], waited: float) -> bool:
        """Whether this has taken too long, here and for all others.

        One that gets on (it writes a large checkpoint) may be what this one waits for.
        """
        limit = self.limit(ranks)
        others = [seen for seen in ranks if seen.state == "alive" and seen.beat.rank != self.rank]
        return min([waited, *(seen.beat.since + seen.silent for seen in others)]) > limit

    def _lost(self, ranks: list[Seen]) -> list[Seen]:
        """Ranks without a sign of life; none where this one cannot give any (a full disk), for they cannot, either."""
        if self._mute:
            return []
        return [seen for seen in ranks if seen.state in ("silent", "stopped") and seen.silent > self.heart_limit]

    def limit(self, ranks: list[Seen]) -> float:
        """Seconds that what is going on may take.

        Args:
            ranks: all that are heard of.
        """
        if self._exchanging and len(ranks) == self.world and all(_EXCHANGE in seen.beat.phase for seen in ranks):
            return self.limits.limit("step")  # nobody is busy with anything else: it is a matter of the network
        return self.limits.limit(self._work, self._of)

    def _over(self, ranks: list[Seen], now: float) -> bool:
        """Whether a peer has ended, and the main thread had time to notice."""
        if not any(seen.beat.rank != self.rank and (seen.beat.failure or seen.state == "gone") for seen in ranks):
            self._lost_at = None
            return False
        self._lost_at = self._lost_at or now
        return now - self._lost_at > _FOLLOW_AFTER

    @property
    def _pause(self) -> float:
        """Seconds between two looks at all ranks, when something has happened."""
        return max(0.2, self.world / 500)

    def look(self, at: range | None = None) -> list[Seen]:
        """All ranks that are heard of, as they are now, in order.

        Args:
            at: which ones; all when left out.
        """
        now = time.monotonic()
        found = [Seen(self._beat, 0.0, "alive")]
        for rank in at or range(self.world):
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
        ranks = self.look()
        limit, key = self.limit(ranks), "dist_timeout" if self._work == "other" else "watchdog.step_limit"
        if self._lost(ranks):
            limit, key = self.heart_limit, "watchdog.heart_limit"
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
                self._report(ranks, waited, limit, key)
                break
            time.sleep(self._pause)
            self._tell()
        self._end(LOST_CONTACT)

    def _report(self, ranks: list[Seen], waited: float, limit: float, key: str) -> None:
        advice = f"{AGAIN if self.ends else 'The run was left as it is.'} If it only needs longer: {key}."
        text = hang_message(ranks, waited=waited, limit=limit, stacks=f"{self.run}/hang/rank-*.txt", advice=advice)
        print(text, file=sys.stderr, flush=True)
        with suppress(OSError):
            (self.run / "hang" / "report.txt").write_text(text + "\n")
        self._tell(reported=True)

    def _tell(self, **changes: Any) -> None:
        with self._lock:
            self._beat = self._beat.next(**changes)
        if self.hearts is not None:
            with self._writing:
                self._mute = not self.hearts.write(self._beat)

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
