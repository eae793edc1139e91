"""A launcher and the ranks below it, seen from outside: who they are, how each one ended, and none left over."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
UNKILLABLE = 60.0
"""Seconds after which a process that was sent SIGKILL counts as one that waits in the kernel, perhaps for ever."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Death:
    """A rank that has ended.

    Attributes:
        rank: its number among all ranks.
        code: its exit code, negative for a signal; None where it could not be seen.
        generation: how often torchrun had restarted the ranks before; 0 elsewhere.
    """

    rank: int
    code: int | None
    generation: int = 0

    def is_of(self, other: "Death") -> bool:
        """Whether it is the same rank's."""
        return (self.rank, self.generation) == (other.rank, other.generation)


@dataclass
class _Rank:
    process: psutil.Process
    rank: int
    generation: int
    pidfd: int | None


class Family:
    """Starts a launcher whose ranks are looked after.

    It and all below it end when this process does: the launcher gets SIGTERM then (Composer's and torchrun's pass it
    on), and ranks look after their parent themselves.

    Args:
        command: the launcher.
        environment: of it, whole.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        if _LIBC is not None:
            # Ranks whose launcher was killed become our children, so that they can be found, ended and reaped.
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.errors = reader
        """What the launcher and its ranks print to stderr."""
        self._ranks: dict[int, _Rank] = {}
        self._ours = os.getpid()
        self._looked = 0.0
        # The launcher holds the reading end, too: were we killed, a rank that says something while it saves would
        # otherwise end with a broken pipe. A session of its own: Ctrl-C comes to us, and we pass it on.
        self.launcher = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stderr=writer,
            pass_fds=(reader,),
            start_new_session=True,
            preexec_fn=self._before_exec if _LIBC is not None else None,
        )
        os.close(writer)

    def _before_exec(self) -> None:
        assert _LIBC is not None
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != self._ours:  # it ended before that
            os._exit(1)

    @property
    def code(self) -> int | None:
        """The launcher's exit code, None while it runs."""
        return self.launcher.poll()

    def deaths(self) -> list[Death]:
        """Ranks that have ended since the last call, in the order of their numbers; cheap enough to ask often."""
        found = []
        for pid, rank in sorted(self._ranks.items(), key=lambda item: item[1].rank):
            if (code := _ended(rank)) is not False:
                found.append(Death(rank.rank, code, rank.generation))
                del self._ranks[pid]
                if rank.pidfd is not None:
                    os.close(rank.pidfd)
        return found

    def look(self, every: float = 0.25) -> None:
        """Looks for ranks that the launcher has started meanwhile."""
        if time.monotonic() < self._looked + every:
            return
        self._looked = time.monotonic()
        try:
            children = psutil.Process(self.launcher.pid).children()
        except psutil.Error:
            return
        for process in children:
            if process.pid not in self._ranks and (rank := _as_rank(process)) is not None:
                self._ranks[process.pid] = rank

    def watched(self) -> list[int]:
        """File descriptors that become readable when a rank ends."""
        return [rank.pidfd for rank in self._ranks.values() if rank.pidfd is not None]

    def signal_ranks(self, signum: signal.Signals) -> int:
        """Sends a signal to the ranks that were found; how many they were."""
        self.look(every=0)
        sent = 0
        for rank in self._ranks.values():
            try:
                rank.process.send_signal(signum)
                sent += 1
            except psutil.Error:
                continue
        return sent

    def signal_launcher(self, signum: signal.Signals) -> None:
        """Sends a signal to the launcher alone."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signum)

    def end(self, patience: float = 10.0, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
        """Nobody of the family is left: SIGTERM, and SIGKILL after `patience` seconds.

        Args:
            patience: seconds.
            meanwhile: called while it waits (who prints must be read, or it waits for its reader).

        Returns:
            The processes that are still there `UNKILLABLE` seconds after SIGKILL; usually none.
        """
        deadline = time.monotonic() + patience
        asked = False
        while members := self._members():
            if time.monotonic() > deadline + UNKILLABLE:
                return sorted(process.pid for process in members)
            if not asked or time.monotonic() > deadline:
                asked = _signal_all(members, signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
            meanwhile()
            self._reap()
            time.sleep(0.05)
        meanwhile()
        self._reap()
        return []

    def close(self) -> None:
        """Closes what was opened; the launcher has ended."""
        os.close(self.errors)
        for rank in self._ranks.values():
            if rank.pidfd is not None:
                os.close(rank.pidfd)
        self._ranks.clear()

    def _members(self) -> list[psutil.Process]:
        """The launcher, and everything below us: what it left over is our child (Linux), or a rank that was seen."""
        self.launcher.poll()
        mine = psutil.Process().children(recursive=True) if _LIBC is not None else []
        known = {process.pid: process for process in (*mine, *(rank.process for rank in self._ranks.values()))}
        return [process for process in known.values() if _lives(process) and process.pid != os.getpid()]

    def _reap(self) -> None:
        """Collects processes that became our children; the launcher is collected by its Popen."""
        if _LIBC is None:
            return
        for process in psutil.Process().children():
            if process.pid != self.launcher.pid and not _lives(process):
                try:
                    os.waitpid(process.pid, os.WNOHANG)
                except ChildProcessError:
                    continue


def _as_rank(process: psutil.Process) -> _Rank | None:
    """A rank, by its environment; None for another child, or for one that was just forked."""
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return None
    if not environment.get("RANK", "").isdigit():
        return None
    generation = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    pidfd = None
    if sys.platform == "linux":
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            return None
    return _Rank(process, int(environment["RANK"]), int(generation) if generation.isdigit() else 0, pidfd)


def _ended(rank: _Rank) -> int | bool | None:
    """False while it lives; else its exit code, or None where its parent has collected it before we looked."""
    if _lives(rank.process):
        return False
    try:
        with open(f"/proc/{rank.process.pid}/stat") as file:  # noqa: PTH123  # what is read is gone in milliseconds
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    # Of a zombie, the status that its parent's wait will see: field 52 of proc(5), of which two stand before ")".
    if fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _signal_all(processes: Sequence[psutil.Process], signum: signal.Signals) -> bool:
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.Error:
            continue
    return True
