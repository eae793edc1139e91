"""Loader workers outlive a SIGTERM that is meant for their rank.

SLURM, systemd (KillMode=control-group) and `kill -- -GROUP` send SIGTERM to all processes of a run at once. The rank
wants to finish its step and save; a loader worker that died of the signal would end the rank with an error instead.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

_CAN_SEE_SENDERS = hasattr(signal, "sigwaitinfo")  # not on macOS


class OutlivesSigterm:
    """For a `DataLoader`, before it in the list of bases: of all SIGTERMs, only the rank's own one ends a worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, worker_init_fn=_answer_the_rank)  # type: ignore[call-arg]

    def _get_iterator(self) -> Any:
        # A worker starts threads before it calls worker_init_fn, and each would take the signal. So it is blocked
        # before the worker is forked: all of its threads inherit that.
        with _sigterm_blocked():
            return super()._get_iterator()  # type: ignore[misc]


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Here it waits for a moment, or another thread takes it."""
    if not _CAN_SEE_SENDERS:
        yield
        return
    # Python unblocks the signal in the thread that starts this helper: here, or in a worker that makes shared memory.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer_the_rank(worker_id: int) -> None:
    """In a worker: a thread that waits for the signal, since it can see who sent it."""
    if _CAN_SEE_SENDERS:
        threading.Thread(target=_answer, args=(os.getppid(),), name="sigterm", daemon=True).start()


def _answer(rank: int) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == rank or os.getppid() != rank:
            os._exit(0)  # as torch's own handler does
