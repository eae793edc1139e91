"""How long it takes until a fault that a test has injected is named, and until the run goes on."""

import datetime
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain.checkpoint import manifest

FAULT_TIMES = "LLMTRAIN_FAULT_TIMES"
"""Environment variable: a folder where each fault leaves a JSON file; docs/reliability.md's table is made of them."""

LIMIT = 60.0
"""Seconds within which a fault is named or recovered from."""

KINDS = (
    *("rank killed", "rank stopped", "launcher killed", "host lost", "network partition", "slow rank"),
    *("out of memory in one rank", "data-loader worker killed", "clock jump", "SIGTERM"),
    *("checkpoint torn", "checkpoint with a flipped bit"),
    *("disk of the checkpoints full", "disk of the checkpoints", "store of checkpoints"),
    *("shard with a flipped bit", "shard missing", "store of data", "NaN", "loss spike"),
)
"""With one of these a fault's name begins. The table follows their order, and lacks none of them."""


@dataclass(frozen=True)
class Observed:
    """One fault, as it went.

    Attributes:
        fault: what was done, in a few words, the first of which are of KINDS: "rank killed (SIGKILL)".
        outcome: what the run did, in a few words: "restarted from the newest checkpoint, same bits".
        detected: seconds from the injection to the message, or to the automatic reaction.
        recovered: seconds from the injection to the next finished step; None where the run ends with a message.
        message: the line that names rank, step and cause.
        date: of the measurement.
        load: of the machine in the minute before (processes that run or want to).
    """

    fault: str
    outcome: str
    detected: float
    recovered: float | None
    message: str
    date: str
    load: float


class Stopwatch:
    """Starts when a fault is injected."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the injection."""
        return time.monotonic() - self._start


def kind_of(fault: str) -> int:
    """Where in KINDS a fault belongs.

    Raises:
        ValueError: nowhere.
    """
    for index, kind in enumerate(KINDS):
        if fault.startswith(kind):
            return index
    raise ValueError(f"{fault!r} begins with none of llmtrain.testing.faults.KINDS")


def damage_of_latest(run: Path) -> list[str]:
    """What is wrong with the checkpoint that `latest` points to; empty where all is well, or there is none."""
    latest = run / "checkpoints" / "latest"
    return manifest.verify(latest) if os.path.lexists(latest) else []


def observe(
    fault: str,
    outcome: str,
    *,
    run: Path,
    detected: float,
    recovered: float | None,
    message: str,
    starts_again: bool = False,
) -> None:
    """Asserts that a fault was named (and recovered from) in time and left `latest` whole; keeps the times.

    Args:
        fault: as of `Observed`, and so are the others.
        outcome: what the run did.
        run: the run's folder. It has ended: nobody publishes or deletes checkpoints there.
        detected: seconds until the message.
        recovered: seconds until the next finished step.
        message: the line.
        starts_again: launchers and ranks are started again, imports and all, and were told to before: only until the
            message it may take no longer than LIMIT.

    Raises:
        AssertionError: it took longer than a minute, there is no message, or `latest` is damaged.
        ValueError: the fault is of no kind.
    """
    kind_of(fault)
    if not message.strip():
        raise AssertionError(f"{fault}: no message")
    for what, seconds in (("named", detected), ("recovered from", recovered)):
        if seconds is not None and seconds > LIMIT and not (starts_again and what == "recovered from"):
            raise AssertionError(f"{fault}: {what} after {seconds:.1f} s, and {LIMIT:.0f} are allowed")
    if damage := damage_of_latest(run):
        raise AssertionError(f"{fault}: `latest` is damaged: {'; '.join(damage)}")
    if folder := os.environ.get(FAULT_TIMES):
        name = "".join(letter if letter.isalnum() else "-" for letter in fault.lower())
        now, load = datetime.date.today().isoformat(), round(os.getloadavg()[0], 1)
        found = Observed(
            fault, outcome, round(detected, 1), recovered and round(recovered, 1), message.strip(), now, load
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(found), indent=1, ensure_ascii=False))
