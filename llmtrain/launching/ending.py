"""How an attempt ended, in words: which rank went first, and what its exit code means."""

import signal
from collections.abc import Sequence
from pathlib import Path

from llmtrain.launching.family import Death
from llmtrain.training import exit_codes

_OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")

MEANING = {
    exit_codes.FAILED: "a crash, or a failed export",
    exit_codes.USER_ERROR: "a mistake that you can mend, named above",
    exit_codes.BAD_STEPS: "stopped by bad_steps",
    exit_codes.LOST_CONTACT: "a hang, or no contact to another rank",
    exit_codes.PREEMPTED: "SIGTERM, after a checkpoint",
}


def first_death(deaths: Sequence[Death]) -> Death | None:
    """The rank that went first, of those that were not ended by their launcher because another one went."""
    bad = [death for death in deaths if death.code != 0]
    return next((death for death in bad if death.code is not None), bad[0] if bad else None)


def shell_code(code: int) -> int:
    """An exit code as a shell gives it: 128 + the signal's number for a signal."""
    return 128 - code if code < 0 else code


def describe(death: Death | None, code: int, step: int, oom_kills: int = 0) -> str:
    """One line: who ended how, and when.

    Args:
        death: the rank that went first, where it was seen.
        code: the launcher's exit code, negative for a signal.
        step: the last finished one; -1 for none.
        oom_kills: processes that the kernel killed for memory meanwhile.
    """
    who = f"rank {death.rank}" if death is not None else "the launcher"
    if death is not None and death.code is not None:
        code = death.code
    elif death is not None:
        return f"{who} ended {_when(step)}, and how could not be seen (the launcher: exit code {shell_code(code)})"
    if code >= 0:
        meaning = MEANING.get(code)
        return f"{who} ended with exit code {code} {_when(step)}" + (f": {meaning}" if meaning else "")
    name = _signal_name(-code)
    line = f"{who} was killed by {name} {_when(step)}"
    if -code == signal.SIGKILL:
        if oom_kills > 0:
            return line + ": out of memory, the kernel's counter of such kills went up"
        return line + ": out of memory? `dmesg` or the cluster's log says so"
    if -code in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return line + ": a crash in native code" + (", or /dev/shm is full" if -code == signal.SIGBUS else "")
    return line


def oom_kills() -> int:
    """Processes of this machine or container that the kernel has killed for memory so far; 0 where nobody counts."""
    for path in _OOM_COUNTERS:
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdigit():
                return int(value)
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _when(step: int) -> str:
    return f"after step {step}" if step > 0 else "before the first step was logged"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
