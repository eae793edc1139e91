"""Sends a run's checkpoints to a store while it trains: in a thread of rank 0, one at a time, the newest first."""

import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from llmtrain.checkpoint.remote import RemoteCheckpoint, RemoteFolder
from llmtrain.checkpoint.remote_upload import Damaged, is_there, tell_best, tell_latest, upload
from llmtrain.checkpoint.resolve import checkpoints_in, step_and_epoch
from llmtrain.checkpoint.retention import Moment, Retention
from llmtrain.prep.stores.retry import attempts, reason
from llmtrain.prep.stores.store import Changed
from llmtrain.training.checkpoint_folder import no_room_beside

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts at a store that fails
LONGEST_AT_THE_END = 10.0
"""The same when the run waits for nothing else."""
SILENCE = 20.0
"""Seconds without a byte after which a store is said not to answer; its client gives up later."""
_TOLD_AGAIN = 600.0  # seconds until a failure that goes on is told once more
_OTHER_CAUSE = 30.0  # the same where the cause is another one
_PROGRESS = 10.0  # seconds between lines while a run waits for its uploads


class _Stopped(ConnectionAbortedError):
    """The run goes another way; to a store's client it looks like a connection that breaks."""


class Uploader:
    """Checkpoints of `folder` go to `remote`, and what retention gives up is deleted there.

    A store that fails does not disturb the training: it is told, and tried again for as long as the run goes on. What
    has not arrived is not deleted here, unless a newer one has. Nothing is kept about it anywhere: a run that starts
    again looks what is there.

    Args:
        remote: where to.
        folder: `checkpoints/` on this machine.
        retention: which ones stay in the store.
        begins: finished steps and epochs at which the run begins or continues. What the store has beyond that was not
            to be had then; it counts for nothing.
        refused: names of checkpoints that are damaged in the store: they count for nothing, and are replaced.
        replaces: names of checkpoints of an earlier run: they go when the first new one has arrived.
        beside: a small file of the run that a checkpoint needs to be continued; goes first, where there is one.
        say: prints a line.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        folder: Path,
        retention: Retention,
        *,
        begins: Moment = (0, 0),
        refused: Iterable[str] = (),
        replaces: Iterable[str] = (),
        beside: Path | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.remote, self.folder, self.retention = remote, folder, retention
        self._begins, self._refused, self._replaces = begins, set(refused), set(replaces)
        self._beside, self._say = beside, say
        self._changed = threading.Condition(threading.RLock())
        self._waiting: dict[str, Moment] = {}
        self._arrived: dict[str, Moment] = {}
        self._times: dict[str, int] = {}
        self._sending: str | None = None
        self._looked, self._untidy, self._told_of_others = False, False, False
        self._failures = 0
        self._failing_since: float | None = None
        self._told: tuple[float, str] = (0.0, "")
        self._hurry, self._stopping = False, False
        self._sent: dict[str, int] = {}
        self._known: dict[str, dict[str, str]] = {}
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="checkpoint uploads", daemon=True)

    def start(self) -> None:
        """Begins, with what an earlier start of the run has not sent."""
        self._thread.start()
        threading.Thread(target=self._watch, name="upload watch", daemon=True).start()

    def published(self, checkpoint: Path) -> None:
        """A checkpoint has got its final name."""
        moment = step_and_epoch(checkpoint.name)
        if moment is None:
            return
        with self._changed:
            self._waiting[checkpoint.name] = moment
            self._times[checkpoint.name] = self._times.get(checkpoint.name, 0) + 1
            self._arrived.pop(checkpoint.name, None)  # of an earlier run, damaged, or before a step back
            self._known.pop(checkpoint.name, None)  # files of that one that an attempt has sent
            self._changed.notify_all()

    def may_delete(self, checkpoint: Path) -> bool:
        """Whether a checkpoint on this machine may go: it has arrived, or a newer one has, or the disk is full.

        The last two are said. A disk that checkpoints fill which wait for a store would take no new ones.
        """
        name, moment = checkpoint.name, step_and_epoch(checkpoint.name)
        with self._changed:
            if moment is None or name in self._arrived:
                return True
            newer = max((one for one in self._arrived.items() if one[1] > moment), key=lambda one: one[1], default=None)
            if name == self._sending:
                return False
            if newer is not None and self._looked:
                why = f"{newer[0]} has arrived, and {name} gives way to it"
            elif no_room_beside(checkpoint):
                why = f"the disk has no room for the next checkpoint beside it, and {name} gives way to newer ones"
            else:
                return False
            if self._waiting.pop(name, None) is not None:
                self._say(f"upload      {name} is not sent any more: {why}")
            return True

    def stop(self, patience: float = 30.0) -> None:
        """Ends the thread, also within a checkpoint; no longer wait for it than `patience` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)

    def missing(self) -> list[str]:
        """Names of those that have not arrived, the newest first."""
        with self._changed:
            return sorted(self._waiting, key=lambda name: self._waiting[name], reverse=True)

    def wait(self, until: Callable[[], float | None] = lambda: None) -> bool:
        """Waits until everything has arrived, with a line of progress every ten seconds.

        Args:
            until: asked again and again: no longer than until then (`time.monotonic`). None: until so many attempts
                in a row have failed as `LLMTRAIN_STORAGE_ATTEMPTS` says.

        Returns:
            Whether everything has arrived.
        """
        if self._thread.ident is None:  # never started: the run has not come to its first step
            return True
        began = said = time.monotonic()
        with self._changed:
            self._hurry, self._failures, self._untidy = True, 0, True  # the best one may be another one by now
            self._changed.notify_all()
            before = sum(self._sent.values())
            while self._waiting or self._untidy or not self._looked:
                end = until()
                if end is None and self._failures >= attempts():
                    break
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if left <= 0 or not self._thread.is_alive():
                    break
                self._changed.wait(left)
                now = time.monotonic()
                if now - said >= _PROGRESS and self._sending is not None:
                    said = now
                    self._say(self._progress(before, now - began))
            return self._looked and not self._waiting

    def _progress(self, before: int, seconds: float) -> str:
        done, size = sum(self._sent.values()), _size(self.folder / (self._sending or ""))
        rate = max(0, done - before) / max(seconds, 1e-9)
        left = f", {max(0, size - done) / rate:.0f} s left" if rate > 0 else ""
        more = f", and {len(self._waiting) - 1} more" if len(self._waiting) > 1 else ""
        return (
            f"upload      waiting for {self._sending}: {done / 1e6:,.1f} of {size / 1e6:,.1f} MB, "
            f"{rate / 1e6:.2f} MB/s{left}{more}"
        )

    def _work(self) -> None:
        while not self._stopping:
            with self._changed:
                while self._looked and not self._waiting and not self._untidy and not self._stopping:
                    self._changed.wait()
            try:
                if not self._looked:
                    self._look()
                elif self._waiting:
                    self._send_newest()
                elif self._untidy:
                    self._tidy()
            except Exception as problem:  # whatever a store's client raises: a run is worth more than its uploads
                if self._stopping:
                    return
                self._failed(problem)
            else:
                self._say_again()
                self._failures = 0

    def _look(self) -> None:
        """Finds out what is in the store already, and what of this machine is to be sent."""
        there = {one.name: one for one in self.remote.checkpoints() if one.is_offered}
        beyond = [one.name for one in there.values() if (one.step, one.epoch) > self._begins and self._counts(one.name)]
        if beyond:
            self._refused |= set(beyond)
            self._say(
                f"upload      {self.remote} holds {beyond[0]}, newer than where this run continues: it stays there "
                "until this run has come as far"
            )
        here = {info.path.name: info for info in checkpoints_in(self.folder) if info.problem is None}
        sound = {name: (one.step, one.epoch) for name, one in there.items() if self._counts(name)}
        arrived = {
            name: (there[name].step, there[name].epoch)
            for name, info in here.items()
            if name in sound and is_there(self.remote, there[name], info.path)
        }
        best = self.remote.best()
        moments = {name: moment for name in here if (moment := step_and_epoch(name)) is not None}
        wanted = self.retention.kept({**sound, **moments}, [best.checkpoint] if best is not None else [])
        with self._changed:
            for name, moment in moments.items():
                if name in wanted and name not in arrived and name not in self._replaces:
                    self._waiting.setdefault(name, moment)
            for name, moment in {**sound, **arrived}.items():
                if name not in self._waiting:
                    self._arrived.setdefault(name, moment)
            self._looked = True
            self._changed.notify_all()

    def _counts(self, name: str) -> bool:
        return name not in self._refused and name not in self._replaces

    def _send_newest(self) -> None:
        with self._changed:
            name = max(self._waiting, key=lambda name: self._waiting[name], default=None)
            if name is None:
                return
            moment, self._sending, self._sent = self._waiting[name], name, {}
            times = self._times.get(name)
            self._moved = time.monotonic()
        path, began = self.folder / name, time.monotonic()
        try:
            self._send_beside()
            how = upload(self.remote, path, self._on_the_way, self._known.setdefault(name, {}))
        except Damaged as problem:
            with self._changed:
                self._waiting.pop(name, None)
            self._say(f"upload      {name} is not sent: {problem}")
            return
        finally:
            with self._changed:
                self._sending = None
        seconds, size = time.monotonic() - began, _size(path)
        with self._changed:
            if self._times.get(name) == times:  # not written anew meanwhile
                self._waiting.pop(name, None)
                self._arrived[name] = moment
            self._refused.discard(name)
            self._replaces.discard(name)
            self._known.pop(name, None)
        self._say(
            f"upload      {name} -> {self.remote}  ({size / 1e6:,.1f} MB, {seconds:.1f} s, "
            f"{size / 1e6 / max(seconds, 1e-9):,.1f} MB/s, {how})"
        )
        self._tidy()

    def _send_beside(self) -> None:
        if self._beside is None:
            return
        if self._beside.is_file():
            self.remote.put(self._beside.name, self._beside.read_bytes())
        else:
            self.remote.store.remove(self.remote.path + self._beside.name)

    def _on_the_way(self, file: str, done: int) -> None:
        """So many bytes of a file are there or on their way."""
        if self._stopping:
            raise _Stopped
        self._sent[file] = done
        self._moved = time.monotonic()
        if self._failing_since is not None and done > 0:
            self._say_again()

    def _tidy(self) -> None:
        """After a checkpoint has arrived: what people read, and then what is given up in the store."""
        with self._changed:
            complete, waiting, self._untidy = dict(self._arrived), set(self._waiting), True
        if complete:
            self._tidy_beside(complete, waiting)
        with self._changed:
            self._untidy = False
            self._changed.notify_all()

    def _tidy_beside(self, complete: dict[str, Moment], waiting: set[str]) -> None:
        newest = max(complete, key=lambda name: complete[name])
        if (self.folder / newest).is_dir():
            tell_latest(self.remote, self.folder / newest)
        best = tell_best(self.remote, self.folder, set(complete))
        kept = self.retention.kept(complete, [best.checkpoint] if best is not None else [])
        found = self.remote.checkpoints()
        self._look_for_others([one for one in found if one.is_offered and one.name not in waiting], complete[newest])
        for one in found:
            older = (one.step, one.epoch) < complete[newest]
            given_up = one.has_manifest and one.name in complete and one.name not in kept
            earlier = one.name in self._replaces and (one.has_manifest or one.was_cut_off)
            damaged = one.has_manifest and older and self.retention.keep >= 0
            damaged = damaged and (one.name in self._refused or one.was_set_aside)
            left = one.was_cut_off and older and one.name not in waiting
            if one.name != newest and (given_up or earlier or damaged or left):
                self.remote.remove(one)
                with self._changed:
                    self._arrived.pop(one.name, None)
                    self._known.pop(one.name, None)
                    self._replaces.discard(one.name)

    def _look_for_others(self, found: Iterable[RemoteCheckpoint], newest: Moment) -> None:
        """Tells once of a checkpoint that only another run can have sent: the two would delete each other's."""
        strange = [one.name for one in found if (one.step, one.epoch) > newest and self._counts(one.name)]
        if strange and not self._told_of_others:
            self._told_of_others = True
            self._say(
                f"warning: {self.remote} has {strange[0]}, which this run has not sent: another run writes there, too. "
                "End one of the two, and give each a save_folder of its own"
            )

    def _failed(self, problem: Exception) -> None:
        """Tells that the store fails, and waits."""
        known = isinstance(problem, (OSError, EOFError, Changed))
        why = reason(problem) if known else f"{type(problem).__name__}: {reason(problem)}"
        with self._changed:
            self._failures += 1
            self._failing_since = self._failing_since or time.monotonic()
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures - 1, 10)) * random.uniform(0.75, 1)
            pause = min(pause, LONGEST_AT_THE_END) if self._hurry else pause
            now = time.monotonic()
            since = now - self._told[0]
            if not self._told[1] or since > _TOLD_AGAIN or (why != self._told[1] and since > _OTHER_CAUSE):
                self._told = (now, why)
                meanwhile = "The run waits" if self._hurry else "Training goes on"
                self._say(
                    f"upload      {self.remote} fails: {why.rstrip('.')}. {meanwhile}; what has not arrived "
                    f"({len(self._waiting)}) stays in {self.folder}. Next attempt in {pause:.0f} s, and so on"
                )
            self._changed.notify_all()
            deadline, hurry = time.monotonic() + pause, self._hurry
            while (left := deadline - time.monotonic()) > 0 and self._hurry == hurry and not self._stopping:
                self._changed.wait(left)

    def _say_again(self) -> None:
        with self._changed:
            since, self._failing_since, self._told = self._failing_since, None, (0.0, "")
        if since is not None:
            self._say(f"upload      {self.remote} works again, after {time.monotonic() - since:.0f} s")

    def _watch(self) -> None:
        """Tells of a store that neither answers nor fails."""
        told: float | None = None
        while not self._stopping:
            time.sleep(2.0)
            with self._changed:
                silent = time.monotonic() - self._moved if self._sending is not None else 0.0
                if silent < SILENCE:
                    told = None
                elif told != self._moved:
                    told = self._moved
                    self._failing_since = self._failing_since or self._moved
                    self._say(
                        f"upload      {self.remote} does not answer: no byte of {self._sending} for {silent:.0f} s. "
                        f"Training goes on; the checkpoint stays in {self.folder}"
                    )


def _size(checkpoint: Path) -> int:
    """Bytes; 0 where it is gone."""
    try:
        return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    except OSError:
        return 0
