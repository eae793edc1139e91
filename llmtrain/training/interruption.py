"""Ctrl-C: one line, and this process ends at once, whatever it is in the middle of.

Nothing is saved: whoever presses Ctrl-C wants the prompt back, and SIGTERM is there for the other case. What is on the
disk stays whole, as it does after SIGKILL.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llmtrain.training.exit_codes import INTERRUPTED
from llmtrain.training.rank_process import end_now, end_within

_STOP = b"\0"
"""No signal has this number."""
_LAST_WORD = 5.0
"""Seconds to tell the others; a shared folder that hangs may take for ever."""


@contextmanager
def ends_this_process() -> Iterator[None]:
    """Within it Ctrl-C (SIGINT) ends this process with exit code 130; where it is ignored (nohup, `&`) it stays so.

    An exception in the main thread would not do: that thread may be inside a collective call that never returns, or in
    a library that takes the exception for its own. So a thread waits for the signal's number, which Python's handler
    writes to a file at once, wherever the main thread is.
    """
    if not _is_ours():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    numbers, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    leave_it_to_the_thread()
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    _of_children()
    listener = threading.Thread(target=_listen, args=(numbers,), name="ctrl-c", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
        os.write(wakeup, _STOP)  # closing it would not do: data workers have inherited it
        listener.join()
        os.close(wakeup)
        os.close(numbers)


def leave_it_to_the_thread() -> None:
    """Once more after imports: Composer's installs a handler that raises SystemExit, and says nothing."""
    if _is_ours():
        signal.signal(signal.SIGINT, _nothing)


def _is_ours() -> bool:
    """Whether the signal may be taken here: Python lets the main thread alone, and who ignores it wants that."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)


def _nothing(*_: object) -> None: ...


@functools.cache  # there is no way to take it back; children that are forked later have their default then already
def _of_children() -> None:
    """Data workers end by an exception, as they do without us; and they do not write to our file."""

    def in_child() -> None:
        if signal.set_wakeup_fd(-1) != -1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    os.register_at_fork(after_in_child=in_child)


def _listen(numbers: int) -> None:
    while (number := os.read(numbers, 1)) != _STOP:
        if number[0] == signal.SIGINT:
            _end()


def _end() -> None:
    watching = sys.modules.get("llmtrain.training.watching")  # imports may be what is interrupted
    current = getattr(watching, "current", None)  # ... half-way
    watchdog = current() if current is not None else None
    after = ""
    if watchdog is not None:
        watchdog.ending.set()  # it need not find a reason; neither need the main thread, which may see peers go
        after = f" after step {watchdog.step}"
    if os.environ.get("RANK", "0") == "0":
        again = "the same command goes on from the newest checkpoint, if there is one (SIGTERM saves first)"
        _last_line(f"stopped     Ctrl-C{after}: {again}")
    end_within(_LAST_WORD, INTERRUPTED)
    if watchdog is not None:
        watchdog.failed("Ctrl-C (SIGINT)", INTERRUPTED)
    end_now(INTERRUPTED)


def _last_line(line: str) -> None:
    """Prints it; what other threads print from here on is not seen: the main thread goes on until the process ends."""
    with suppress(OSError):
        word = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        time.sleep(0.05)  # a line that is being written now
        os.write(word, f"\n{line}\n".encode())  # behind the ^C of a terminal, or half a line of the main thread
