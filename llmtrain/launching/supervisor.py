"""Starts a run again when it crashes, and stops where that would not help."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.launching.attempt import Attempt, Requests, Runner
from llmtrain.launching.ending import describe, first_death, oom_kills, shell_code
from llmtrain.launching.family import Death
from llmtrain.launching.progress import Progress, progress
from llmtrain.training import exit_codes

BACKOFF = (1.0, 5.0, 15.0, 60.0)
"""Seconds before the first, second, ... restart; the last one from then on."""
FRUITLESS = 2
"""So many restarts in a row without a new step or checkpoint are a crash loop."""
PORTS = 3
"""How often a port that was taken meanwhile is exchanged for another, beside the restarts."""

_PLACES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("NODE_RANK", "BASE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
        *("LLMTRAIN_VERDICT", "LLMTRAIN_ELASTIC"),
    }
)


@dataclass(frozen=True)
class Job:
    """What is supervised.

    Attributes:
        command: makes the launcher's command, anew for each attempt (its port may change).
        environment: the launcher's variables, whole.
        run: the run's folder, where its progress stands.
        save_folder: of its checkpoints, where they are files.
        max_restarts: restarts until it gives up.
        restart_preempted: start again, too, after ranks were sent SIGTERM by somebody else.
        elastic: the launcher is torchrun, which restarts ranks by itself, and passes SIGTERM on.
        verdict: the file where a rank leaves an exit code after which a restart is pointless (torchrun's own says
            only that something failed).
        grace: seconds that ranks have to save and end after SIGTERM.
        port: where ranks or hosts meet, if it is always the same; None when the launcher takes one that is free.
        backoff: seconds before each restart.
    """

    command: Callable[[], Sequence[str]]
    environment: Mapping[str, str]
    run: Path
    save_folder: Path | None = None
    max_restarts: int = 3
    restart_preempted: bool = False
    elastic: bool = False
    verdict: Path | None = None
    grace: float = 300.0
    port: int | None = None
    backoff: Sequence[float] = field(default=BACKOFF)

    def reached(self) -> Progress:
        """How far the run has come."""
        return progress(self.run, self.save_folder)


def say(line: str) -> None:
    """Prints a line of ours, if anybody still listens."""
    with contextlib.suppress(OSError, ValueError):
        print(f"launch      {line}", file=sys.stderr, flush=True)


def supervise(job: Job) -> int:
    """Runs a job until it is finished, asked to end, or beyond help.

    Returns:
        The exit code as a shell gives it: 0 finished; 2, 3: a restart would end the same way; 143: asked to end;
        otherwise that of the rank that went first in the last attempt.
    """
    with Requests().listen() as requests:
        return _Supervisor(job, requests).run()


class _Supervisor:
    def __init__(self, job: Job, requests: Requests) -> None:
        self.job = job
        self.requests = requests
        self.restarts = 0
        self.fruitless = 0
        self.ports = 0
        self.best = job.reached()
        self.oom_kills = oom_kills()
        self.said: set[int] = set()  # generations of which a death was told

    def run(self) -> int:
        while True:
            _without_verdict(self.job.verdict)
            attempt = self._attempt()
            if (code := self._final(attempt)) is not None:
                return code
            if self.requests.count:  # while we waited before the restart
                return self._asked_between()

    def _attempt(self) -> Attempt:
        self.said.clear()
        runner = Runner(
            self.requests,
            to_launcher=self.job.elastic,
            grace=self.job.grace,
            on_death=self._say_death,
        )
        return runner.run(self.job.command(), self.job.environment)

    def _final(self, attempt: Attempt) -> int | None:
        """The exit code, or None when it is to be started again (after the pause)."""
        now = self.job.reached()
        death = first_death(attempt.deaths)
        code = self._code(attempt, death)
        if code == 0:
            return 0
        if self.requests.first is not None:
            return self._asked(attempt, code, now)
        if code in exit_codes.POINTLESS:
            why = "a mistake that you can mend" if code == exit_codes.USER_ERROR else "the recipe's bad_steps"
            say(f"exit code {code}: {why}. Not started again: it would end the same way.")
            return code
        if code == exit_codes.PREEMPTED and not self.job.restart_preempted:
            say("somebody sent the ranks SIGTERM, and they saved. The same command continues.")
            return code
        if attempt.left:
            numbers = ", ".join(map(str, attempt.left))
            say(
                f"process {numbers} does not end, not even by SIGKILL: it waits in the kernel, for a disk or a GPU "
                "that does not answer. Not started again: it may still write. The machine may have to be started anew."
            )
            return shell_code(code)
        if attempt.port_taken and not now.further_than(self.best):
            if self.job.port is None and self.ports < PORTS:
                self.ports += 1
                say("the port was taken meanwhile; again with another one")
                return None
            if self.job.port in attempt.ports_taken:
                say(f"port {self.job.port} is taken: by another launch, or by what is left of one? Choose another.")
        if death is None or death.generation not in self.said:
            say(describe(death, code, now.step, oom_kills() - self.oom_kills))
        return self._restart_or_give_up(attempt, code, now)

    def _restart_or_give_up(self, attempt: Attempt, code: int, now: Progress) -> int | None:
        if self.restarts:
            self.fruitless = 0 if now.further_than(self.best) else self.fruitless + 1
        self.best = self.best.together_with(now)
        if self.fruitless >= FRUITLESS:
            where = f"step {self.best.step}" if self.best.step >= 0 else "the first step"
            say(
                f"crash loop: {self.fruitless} restarts brought it no further than {where}. The fault comes again; it "
                "is named above. Mend it and start the same command: the run continues from its newest checkpoint."
            )
            return shell_code(code)
        if self.restarts >= self.job.max_restarts or self._used_up(attempt):
            say(
                f"given up after {self.job.max_restarts} restarts (--max-restarts). The same command continues from "
                "the newest checkpoint."
            )
            return shell_code(code)
        pause = self.job.backoff[min(self.restarts, len(self.job.backoff) - 1)]
        self.restarts += 1
        newest = f"step {now.checkpoint}" if now.checkpoint >= 0 else "the beginning: there is no checkpoint"
        say(f"restart {self.restarts} of {self.job.max_restarts} in {pause:g} s, from {newest}")
        self.oom_kills = oom_kills()
        self.requests.sleep(pause)
        return None

    def _code(self, attempt: Attempt, death: Death | None) -> int:
        """The exit code of the rank that went first; the launcher's own is that of the lowest one that failed."""
        if attempt.code == 0:
            return 0
        if self.job.verdict is not None and (text := _read(self.job.verdict)).isdigit():
            return int(text)
        return death.code if death is not None and death.code is not None else attempt.code

    def _used_up(self, attempt: Attempt) -> bool:
        """Whether torchrun has made all of its restarts: then it did not end for want of the other hosts."""
        return self.job.elastic and any(
            death.code != 0 and death.generation >= self.job.max_restarts for death in attempt.deaths
        )

    def _asked(self, attempt: Attempt, code: int, now: Progress) -> int:
        assert self.requests.first is not None
        name = self.requests.first.name
        if attempt.overdue:
            say(f"{name}: killed, since it did not end in time. The same command continues from its newest checkpoint.")
            return 128 + signal.SIGKILL
        if self.job.elastic and all(death.code in (None, 0, exit_codes.PREEMPTED) for death in attempt.deaths):
            code = exit_codes.PREEMPTED  # torchrun's own says only that something failed
        if code == exit_codes.PREEMPTED:
            say(f"{name}: ended. The same command continues.")
            return exit_codes.PREEMPTED
        newest = f"step {now.checkpoint}" if now.checkpoint >= 0 else "the beginning"
        say(f"{name}: ended without a last checkpoint ({describe(None, code, now.step)}). It continues from {newest}.")
        return shell_code(code)

    def _asked_between(self) -> int:
        assert self.requests.first is not None
        say(f"{self.requests.first.name}: not started again. The same command continues.")
        return exit_codes.PREEMPTED

    def _say_death(self, death: Death) -> None:
        """At once for the first rank that is killed: the others may take long to notice, and say less.

        Of a rank that ends by itself we hear from that rank, and from torchrun only at the end of everything.
        """
        if self.requests.count or death.code is None or death.generation in self.said:
            return
        if death.code in exit_codes.POINTLESS:  # the rank has said why, and what follows from it comes at the end
            return
        if death.code < 0 if not self.job.elastic else death.code not in (-signal.SIGTERM, exit_codes.PREEMPTED):
            self.said.add(death.generation)
            say(describe(death, 0, self.job.reached().step, oom_kills() - self.oom_kills))


def _without_verdict(path: Path | None) -> None:
    """Makes room for the verdict of an attempt.

    Raises:
        UserError: its folder cannot be written, so the run could not either.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def of_a_launch(variable: str) -> bool:
    """Whether a launcher tells a process its place by this variable."""
    return variable in _PLACES or variable.startswith("TORCHELASTIC_")


def inherited(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's variables without those of an outer launch, which a launcher would take for its own."""
    return {**{key: value for key, value in os.environ.items() if not of_a_launch(key)}, **extra}
