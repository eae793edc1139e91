"""Signs of life: each rank tells every second where it is, and reads about the others when it waits long."""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

HEARTBEATS = "heartbeats"
"""Folder inside of the run's: a file for each rank."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        rank: which one.
        host: its host's name.
        machine: the same for processes that see each other's ids, and for no others.
        pid: its process.
        count: goes up; a count that stands still is a heart that has stopped.
        step: the last finished one.
        phase: `starting`, `step 58`, `evaluation`, ...
        since: seconds in which nothing was finished.
        kind: of `llmtrain.training.stacks.Place`; empty while nothing takes long.
        place: its text.
        hang: this rank's watchdog has written its stacks.
        reported: it has also told the user.
        failure: what it failed of, itself; empty while it lives.
        code: the exit code that goes with it.
        ended: it left: `finished`, `failed`, or `followed` (another rank had failed).
        wall: seconds since 1970 on its host, for people; they decide nothing but which of two failures came first.
    """

    rank: int
    host: str
    machine: str
    pid: int
    count: int = 0
    step: int = 0
    phase: str = "starting"
    since: float = 0.0
    kind: str = ""
    place: str = ""
    hang: bool = False
    reported: bool = False
    failure: str = ""
    code: int = 0
    ended: str = ""
    wall: float = 0.0

    @classmethod
    def of_this_process(cls, rank: int) -> "Beat":
        """The first one."""
        return cls(rank, socket.gethostname(), machine(), os.getpid(), wall=time.time())

    def next(self, **changes: Any) -> "Beat":
        """The one after this."""
        return replace(self, count=self.count + 1, wall=time.time(), **changes)

    @property
    def name(self) -> str:
        """The rank, where it runs."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def machine() -> str:
    """Names the processes whose ids can be looked up here: those of this boot and this namespace of process ids."""
    return _machine(os.getpid())


@lru_cache(maxsize=1)
def _machine(pid: int) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {pid}"  # sees nobody but itself


def process_state(beat: Beat) -> str | None:
    """`gone`, `stopped` or `runs`, of a rank on this machine; None: of another one, or it cannot be said."""
    if beat.machine != machine():
        return None
    try:
        text = Path(f"/proc/{beat.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    except OSError:
        return None
    letter = text.rpartition(")")[2].split()[0]
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")


class Heartbeats:
    """Beats in files, in a folder that all ranks see.

    Args:
        folder: `RUN/heartbeats`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, beat: Beat) -> bool:
        """Replaces this rank's beat by one rename. A folder that cannot be written is no reason to end a run.

        Returns:
            Whether it was written.
        """
        path = self.folder / f"rank-{beat.rank}"
        temporary = path.with_name(f".rank-{beat.rank}")
        try:
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(path)
        except OSError:
            return False
        return True

    def read(self, rank: int) -> Beat | None:
        """A rank's newest beat; None where there is none, or none that can be read."""
        try:
            values = json.loads((self.folder / f"rank-{rank}").read_text())
            known = {field.name for field in fields(Beat)}
            return Beat(**{key: value for key, value in values.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def remove(self, rank: int) -> None:
        """At the end; the last one removes the folder."""
        for name in (f"rank-{rank}", f".rank-{rank}"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
