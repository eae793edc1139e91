"""Loader workers outlive a SIGTERM that is meant for their rank.

SLURM, systemd (KillMode=control-group) and `kill -- -GROUP` send SIGTERM to all processes of a run at once. The rank
wants to finish its step and save; a loader worker that died of the signal would end the rank with an error instead.
"""

import os
import signal
import threading


def ignore_others_sigterm(worker_id: int) -> None:
    """For `worker_init_fn`: of all SIGTERMs, only the rank's own one ends this worker, as torch wants it.

    Args:
        worker_id: torch passes it; it does not matter.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    rank = os.getppid()
    # Threads that begin later inherit the mask, so the signal waits for the one below, which can see its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_answer, args=(rank,), name="sigterm", daemon=True).start()


def _answer(rank: int) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == rank or os.getppid() != rank:
            os._exit(0)
