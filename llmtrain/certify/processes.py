"""The ranks of a run as processes of this machine, in a few seconds.

Importing Composer takes longer than training a tiny model. So ranks are forked from a server process that has done the
imports (the standard library's forkserver); apart from that they are what the launcher starts: processes of their own
with the same environment variables.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path


def preload(*, at_once: bool = False) -> None:
    """Has the fork server import Composer and llmtrain once, which takes longer than a tiny run.

    Args:
        at_once: start the server now, and not with the first process.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["llmtrain.certify.preloaded"])
    if at_once:
        forkserver.ensure_running()


def as_if_launched() -> None:
    """Called in a rank: processes that it starts in turn (a DataLoader's workers) are forked, as with the launcher.

    The start method is inherited, and each worker would come from a fork server of its own, imports and all.
    """
    multiprocessing.set_start_method("fork", force=True)


class Ranks:
    """Processes that train a recipe.

    Args:
        arguments: of the command `train`: a recipe, and `key=value`.
        ranks: number of processes.
        cwd: their working directory.
        log: file for what they print, all of them.
        environment: variables that they have besides those of this process.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        *,
        cwd: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        preload()
        port, variables = free_port(), dict(environment or {})
        self.processes = [
            context.Process(target=_rank, args=(rank, ranks, port, str(cwd), str(log), list(arguments), variables))
            for rank in range(ranks)
        ]
        try:
            for process in self.processes:
                process.start()
        except BaseException:  # interrupted between two of them
            self.kill()
            raise

    def send(self, signum: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to all ranks, or to some."""
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)

    @property
    def alive(self) -> bool:
        """Whether a rank still runs."""
        return any(process.exitcode is None for process in self.processes if process.pid is not None)

    @property
    def codes(self) -> tuple[int | None, ...]:
        """Exit code of each rank: negative for a signal, None while it runs."""
        return tuple(process.exitcode for process in self.processes)

    def kill(self) -> None:
        """SIGKILL for all; returns when they are gone."""
        while self.alive:
            self.send(signal.SIGKILL)
            time.sleep(0.005)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _rank(
    rank: int, ranks: int, port: int, cwd: str, log: str, arguments: list[str], environment: dict[str, str]
) -> None:
    threading.Thread(target=_end_with_starter, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    as_if_launched()
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WANDB_MODE="offline",
    )
    from llmtrain.training.command import main

    sys.exit(main(arguments))


def _end_with_starter() -> None:
    """A rank of a command that was killed would train on, unseen."""
    starter = multiprocessing.parent_process()
    if starter is not None:
        starter.join()
        os.kill(os.getpid(), signal.SIGKILL)
