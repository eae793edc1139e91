"""One start of a launcher: what it prints is passed on and looked at, signals are passed to the ranks."""

import contextlib
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from llmtrain.launching.family import Death, Family

_COMPOSER_SAYS = re.compile(r"Rank (\d+) crashed with exit code (-?\d+)\.")
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_WHICH_PORT = re.compile(r"port: (\d+)")
_LONGEST_LINE = 1 << 16
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Attempt:
    """How it went.

    Attributes:
        code: the launcher's exit code, negative for a signal.
        deaths: ranks that ended, in the order in which that was seen.
        overdue: it was asked to end, did not in time, and was killed.
        port_taken: a rank could not listen where it should.
        ports_taken: which ports those were, where it was said.
        left: processes that did not end, not even by SIGKILL.
        seconds: how long it took.
    """

    code: int = 0
    deaths: list[Death] = field(default_factory=list)
    overdue: bool = False
    port_taken: bool = False
    ports_taken: set[int] = field(default_factory=set)
    left: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Requests:
    """Signals that this process was sent: how often, and which was the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: signal.Signals | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator["Requests"]:
        """Takes SIGTERM, SIGINT and SIGHUP over for a while, but for what is to be ignored (nohup, `&` in a script)."""
        wanted = [signum for signum in _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, self._handle) for signum in wanted}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or signal.Signals(signum)

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not beyond a request."""
        end = time.monotonic() + seconds
        while not self.count and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


class Runner:
    """Starts a launcher and stays with it until it and all of its ranks have ended.

    Args:
        requests: signals to this process; the first asks the ranks to save and end.
        to_launcher: the launcher itself passes SIGTERM on and waits (torchrun); else the ranks get it from here, since
            Composer's launcher would kill them half a minute later.
        grace: seconds that the ranks have to save and end.
        on_death: called with each rank that has ended with another code than 0.
    """

    def __init__(
        self,
        requests: Requests,
        *,
        to_launcher: bool = False,
        grace: float = 300.0,
        on_death: Callable[[Death], None] = lambda death: None,
    ) -> None:
        self.requests = requests
        self.to_launcher = to_launcher
        self.grace = grace
        self.on_death = on_death

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> Attempt:
        """Starts `command` and waits for its end; nothing of it is left over."""
        began, attempt = time.monotonic(), Attempt()
        family = Family(command, environment)
        output = _Output(family.errors, attempt)
        passed, deadline = 0, 0.0
        while family.code is None:
            self._wait(family, output)
            self._note([*family.deaths(), *output.crashed], attempt)
            family.look()
            if self.requests.count > passed:
                passed = self.requests.count
                deadline = self._pass_on(family, passed)
            if passed and time.monotonic() > deadline:
                attempt.overdue = True
                break
        if (family.code or 0) >= 0:  # a launcher that was killed itself went before its ranks
            self._note([*family.deaths(), *output.crashed], attempt)
        attempt.left = family.end(patience=2.0 if attempt.overdue else 10.0, meanwhile=output.read)
        code = family.code if attempt.left else family.launcher.wait()
        attempt.code = -signal.SIGKILL if code is None else code
        output.read()
        output.close()
        family.close()
        attempt.seconds = time.monotonic() - began
        return attempt

    def _note(self, deaths: Sequence[Death], attempt: Attempt) -> None:
        """Keeps each death once: Composer's launcher tells some of those that were seen."""
        for death in deaths:
            index = next((i for i, known in enumerate(attempt.deaths) if known.is_of(death)), None)
            if index is None:
                attempt.deaths.append(death)
            elif attempt.deaths[index].code is None and death.code is not None:
                attempt.deaths[index] = death
            else:
                continue
            if death.code != 0:
                self.on_death(death)

    def _wait(self, family: Family, output: "_Output") -> None:
        with selectors.DefaultSelector() as selector:
            for descriptor in (output.descriptor, *family.watched()):
                if descriptor is not None:
                    selector.register(descriptor, selectors.EVENT_READ)
            if selector.get_map():
                selector.select(0.2)
            else:
                time.sleep(0.1)
        output.read()

    def _pass_on(self, family: Family, count: int) -> float:
        """Asks to end, the more urgently the more often we were asked; until when they may take."""
        if count == 1:
            if self.to_launcher or not family.signal_ranks(signal.SIGTERM):
                family.signal_launcher(signal.SIGTERM)
            return time.monotonic() + self.grace
        if count == 2:
            family.signal_launcher(signal.SIGTERM)
            return time.monotonic() + min(self.grace, 40.0)
        return time.monotonic()


class _Output:
    """Passes on what comes from a pipe, and keeps what tells how ranks ended."""

    def __init__(self, descriptor: int, attempt: Attempt) -> None:
        self.descriptor: int | None = descriptor
        self.attempt = attempt
        self.crashed: list[Death] = []
        """What Composer's launcher said of its ranks."""
        self.line = b""

    def read(self) -> None:
        while self.descriptor is not None:
            try:
                data = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.descriptor = None
                return
            _write(data)
            *lines, self.line = (self.line + data).split(b"\n")
            self.line = self.line[-_LONGEST_LINE:]
            for line in lines:
                self._look_at(line.decode(errors="replace"))

    def close(self) -> None:
        if self.line:
            self._look_at(self.line.decode(errors="replace"))
            _write(b"\n")

    def _look_at(self, line: str) -> None:
        if _PORT_TAKEN.search(line):
            self.attempt.port_taken = True
            if (port := _WHICH_PORT.search(line)) is not None:
                self.attempt.ports_taken.add(int(port[1]))
        if (match := _COMPOSER_SAYS.search(line)) is not None:
            self.crashed.append(Death(int(match[1]), int(match[2])))


def _write(data: bytes) -> None:
    # Whoever reads our messages may be gone (a terminal that was closed); the run goes on.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        while data:  # a signal ends a write early
            data = data[os.write(2, data) :]
