"""The process of a rank: who started it, and how it leaves when nothing else works."""

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_SHELLS = ("sh", "bash", "dash", "zsh", "fish", "ksh", "ash", "tcsh", "busybox", "tmux", "screen", "sshd")


def launcher() -> int | None:
    """The process that started this one, if its end means that the run shall end; a shell's does not (nohup)."""
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ or os.getppid() <= 1:
        return None
    try:
        name = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        return None
    return None if name.lstrip("-") in _SHELLS else os.getppid()


def end_within(seconds: float, code: int) -> None:
    """Has this process end for certain: by itself until then, or as `end_now` does."""

    def end() -> None:
        time.sleep(seconds)
        end_now(code)

    with suppress(RuntimeError):  # a process without memory cannot start a thread; its launcher ends it
        threading.Thread(target=end, daemon=True).start()


def end_now(code: int) -> NoReturn:
    """Leaves without waiting for anybody; takes its data workers along, and the node's temporary folder.

    Workers would notice by themselves, a few seconds later: with a traceback each, of a connection that is gone.
    """
    with suppress(Exception):
        for worker in multiprocessing.active_children():
            worker.kill()
    folder = tempfile.tempdir
    if folder and os.environ.get("LOCAL_RANK", "0") == "0" and Path(folder).name.startswith("llmtrain-"):
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
