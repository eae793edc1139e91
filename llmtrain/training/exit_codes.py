"""What the exit code of a training rank says to whoever started it. Imports nothing: launchers read it, too."""

FINISHED = 0
"""Trained to the end, now or before."""
FAILED = 1
"""A crash, or an export that failed. Starting again may help."""
USER_ERROR = 2
"""A mistake in the recipe or its surroundings. Starting again does not help."""
BAD_STEPS = 3
"""Stopped by the recipe's `bad_steps`. Starting again does not help."""
LOST_CONTACT = 75
"""The watchdog ended a hang, or a peer is gone. Starting again helps (sysexits.h: EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Ctrl-C (SIGINT): 128 + 2. Nothing was saved; the same command goes on from the newest checkpoint."""
PREEMPTED = 143
"""SIGTERM, after a checkpoint: 128 + 15. The same command continues."""

POINTLESS = frozenset({USER_ERROR, BAD_STEPS})
"""Codes after which the same command would end the same way."""
