"""How far a long prompt has been read, on standard error."""

import sys
import time

SECONDS_BEFORE = 2.0
"""A prompt that is read in less needs no word."""
SECONDS_BETWEEN_LINES = 5.0
"""In a log; on a terminal one line is written over."""


class PrefillProgress:
    """Call it with how many tokens have been read and how many there are: with 0 first."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._start = self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Say it, if it takes long."""
        now = time.monotonic()
        if done == 0:
            self._start, self._said = now, 0.0
            return
        seconds = now - self._start
        if seconds < SECONDS_BEFORE and not self._said:
            return
        if done < total and self._said and not self._terminal and now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        line = f"prompt: {done:,} of {total:,} tokens read, {done / seconds:,.0f} tokens/s"
        last = done == total
        if self._terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
