"""How long it takes until a fault that a test has injected is named, and until the run goes on."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FAULT_TIMES = "LLMTRAIN_FAULT_TIMES"
"""Environment variable: a folder where each fault leaves a JSON file; docs/reliability.md's table is made of them."""

LIMIT = 60.0
"""Seconds within which a fault is named or recovered from."""


@dataclass(frozen=True)
class Observed:
    """One fault, as it went.

    Attributes:
        fault: what was done, in a few words: "rank 1 killed (SIGKILL)".
        outcome: what the run did, in a few words: "restarted from the newest checkpoint, same bits".
        detected: seconds from the injection to the message, or to the automatic reaction.
        recovered: seconds from the injection to the next finished step; None where the run ends with a message.
        message: the line that names rank, step and cause.
    """

    fault: str
    outcome: str
    detected: float
    recovered: float | None
    message: str


class Stopwatch:
    """Starts when a fault is injected."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Since the injection."""
        return time.monotonic() - self._start


def observe(fault: str, outcome: str, *, detected: float, recovered: float | None, message: str) -> None:
    """Asserts that a fault was named (and recovered from) in time, and keeps the times for the table.

    Raises:
        AssertionError: it took longer than a minute, or there is no message.
    """
    if not message.strip():
        raise AssertionError(f"{fault}: no message")
    for what, seconds in (("named", detected), ("recovered from", recovered)):
        if seconds is not None and seconds > LIMIT:
            raise AssertionError(f"{fault}: {what} after {seconds:.1f} s, and {LIMIT:.0f} are allowed")
    if folder := os.environ.get(FAULT_TIMES):
        name = "".join(letter if letter.isalnum() else "-" for letter in fault.lower())
        observed = Observed(fault, outcome, round(detected, 1), recovered and round(recovered, 1), message.strip())
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(observed), indent=1, ensure_ascii=False))
