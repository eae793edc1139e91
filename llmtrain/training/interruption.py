"""Ctrl-C: one line, and this process ends at once, whatever it is in the middle of.

Nothing is saved: whoever presses Ctrl-C wants the prompt back, and SIGTERM is there for the other case. What is on the
disk stays whole, as it does after SIGKILL.
"""

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmtrain.training.exit_codes import INTERRUPTED
from llmtrain.training.rank_process import end_now

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
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    if not in_main or handler in (signal.SIG_IGN, None):
        yield
        return
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
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _nothing)


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
        print(f"stopped     Ctrl-C{after}: {again}", file=sys.stderr, flush=True)
    end = threading.Timer(_LAST_WORD, end_now, [INTERRUPTED])
    end.daemon = True
    end.start()
    if watchdog is not None:
        watchdog.failed("Ctrl-C (SIGINT)", INTERRUPTED)
    end_now(INTERRUPTED)
