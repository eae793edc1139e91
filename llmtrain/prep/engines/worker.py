"""The process that a local engine starts: takes numbers of units over a pipe, and does them."""

import os
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

from llmtrain.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_BETWEEN_REPORTS = 0.2


def main(descriptor: int, parent: int) -> None:
    """Do units of work until the pipe ends.

    Args:
        descriptor: of the pipe.
        parent: id of the process that holds its other end.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: it is for the parent to say stop
    connection: Connection = Connection(descriptor)
    try:
        task = connection.recv()
        while True:
            number = connection.recv()
            progress = _Progress(connection)
            try:
                task(number, progress.advance)
            except UserError as mistake:
                connection.send(("mistake", _as_it_arrives(mistake)))
            except Exception:
                connection.send(("error", traceback.format_exc()))
            else:
                progress.report()
                connection.send(("done", None))
    except (EOFError, ConnectionResetError, BrokenPipeError):  # no more work, or the parent is no more
        return


class _Progress:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._bytes = 0
        self._said = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        """Take note, and report now and then."""
        self._bytes += n_bytes
        if time.monotonic() - self._said > _SECONDS_BETWEEN_REPORTS:
            self.report()

    def report(self) -> None:
        """Tell the parent."""
        self._connection.send(("bytes", self._bytes))
        self._bytes = 0
        self._said = time.monotonic()


def _as_it_arrives(mistake: UserError) -> UserError:
    """The exception itself if it can travel, otherwise its message."""
    try:
        arrived = pickle.loads(pickle.dumps(mistake))
    except Exception:
        return UserError(str(mistake))
    return mistake if str(arrived) == str(mistake) else UserError(str(mistake))


def _die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, even by SIGKILL (Linux; elsewhere the pipe tells)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)
