"""A run that fails says once which rank failed, after which step, of what, and what to do."""

import json
import logging
import os
import re
import sys
import time
import traceback
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.redaction import redact_text
from llmtrain.training import watching
from llmtrain.training.exit_codes import FAILED, LOST_CONTACT, USER_ERROR
from llmtrain.training.rank_process import end_within
from llmtrain.training.watchdog import following

FAILURES = "failures"
"""Folder inside of the run's: for each rank that failed by itself, a JSON file and its traceback."""

_LAST_WORD = 20.0
"""Seconds for an orderly end of the process after a failure; peers that are gone can make it wait for ever."""

_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|closed by (remote )?peer|broken pipe|socket ?timeout|"
    r"timed out (after )?(waiting )?|wait timeout|ncclRemoteError|ncclSystemError|remote process exited|"
    r"no available (work|connection)|failed to recv|failed to send|NCCL communicator was aborted|"
    r"application timeout caused pair closure|gloo.*(timeout|timed out|closed|error)",
    re.IGNORECASE,
)
_ADVICE = (
    (
        re.compile(r"DataLoader worker .*(killed|exited)", re.IGNORECASE | re.DOTALL),
        "A process that reads data was killed, most often because the host's memory (or /dev/shm) was full: give the "
        "loader fewer num_workers, or the host more memory.",
    ),
    (
        re.compile(r"out of memory|can't allocate memory|cannot allocate memory|MemoryError|bad_alloc", re.IGNORECASE),
        "Out of memory: lower device_train_microbatch_size (the result stays the same), shard the model over more "
        "ranks, or set fsdp_config.activation_checkpointing.",
    ),
    (re.compile(r"no space left on device", re.IGNORECASE), "The disk is full: free some space."),
    (re.compile(r"CUDA error|ECC|Xid", re.IGNORECASE), "The GPU or its driver failed: look at dmesg on that host."),
)


def cause_of(error: BaseException) -> str:
    """What failed, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, MemoryError):
        text = f"MemoryError: {text}"
    elif not isinstance(error, (UserError, RuntimeError)):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def advice_for(cause: str) -> str:
    """What to do about it, where that is known."""
    return next((advice for pattern, advice in _ADVICE if pattern.search(cause)), "")


def is_consequence(error: BaseException) -> bool:
    """Whether an error looks as if another rank had failed before; the only rank of a run has no other."""
    if isinstance(error, UserError) or os.environ.get("WORLD_SIZE") == "1" or _reads_data(error):
        return False
    return isinstance(error, (RuntimeError, ConnectionError, TimeoutError)) and bool(_CONSEQUENCE.search(str(error)))


def _reads_data(error: BaseException) -> bool:
    """Whether it came up where a batch is read: a store of data resets connections, too, and that is its own fault."""
    files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)]
    if not files or "/torch/distributed/" in files[-1]:  # ranks also meet in a loader
        return False
    return any(part in file for file in files for part in ("/torch/utils/data/", "/streaming/", "/llmtrain/data/"))


def note_failure(run: Path, *, rank: int, step: int, cause: str, code: int, text: str) -> Path | None:
    """Leaves what failed in RUN/failures, for people and for whoever starts the run again.

    Args:
        run: the run's folder.
        rank: which one.
        step: the last finished step.
        cause: one line.
        code: the exit code that follows.
        text: the traceback.

    Returns:
        The file with the traceback, or None when it cannot be written.
    """
    folder = run / FAILURES
    record = {
        "rank": rank,
        "step": step,
        "cause": redact_text(cause),
        "code": code,
        "pid": os.getpid(),
        "wall": time.time(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank-{rank}.txt").write_text(redact_text(text))
        temporary = folder / f".rank-{rank}.json"
        temporary.write_text(json.dumps(record))
        temporary.replace(folder / f"rank-{rank}.json")
    except OSError:
        return None
    return folder / f"rank-{rank}.txt"


def report(error: Exception, run: Path) -> int:
    """Says what is to be said of an error that ends this rank, and returns its exit code.

    Args:
        error: what was raised.
        run: the run's folder.
    """
    watchdog = watching.current()
    if watchdog is not None and watchdog.ending.is_set():
        time.sleep(30)  # its thread is telling the user, and ends this process
    rank = int(os.environ.get("RANK", "0"))
    step = watchdog.step if watchdog is not None else 0
    text = "".join(traceback.format_exception(error))
    if logging.getLogger("llmtrain").isEnabledFor(logging.DEBUG):
        print(text, file=sys.stderr, flush=True)
    end_within(_LAST_WORD, getattr(error, "exit_code", FAILED))
    if is_consequence(error):
        if watchdog is not None:
            first, ranks = watchdog.first_cause()
            watchdog.followed()
            message, code = following(watchdog, first, ranks)
            if first is None:
                file = note_failure(run, rank=rank, step=step, cause=cause_of(error), code=code, text=text)
                message = message and f"{message} ({cause_of(error)}; traceback: {file})"
            if message:
                print(message, file=sys.stderr, flush=True)
            return code
        code = LOST_CONTACT
    else:
        code = USER_ERROR if isinstance(error, UserError) else FAILED
    code = int(getattr(error, "exit_code", code))
    cause = cause_of(error)
    if watchdog is not None:
        watchdog.failed(cause, code)
    file = note_failure(run, rank=rank, step=step, cause=cause, code=code, text=text)
    if isinstance(error, UserError):
        cause = str(error)
    else:
        parts = [cause.rstrip("."), advice_for(cause), f"Traceback: {file}" if file else text]
        cause = ". ".join(part.rstrip(".") for part in parts if part)
    agreed = isinstance(error, UserError) and error.agreed
    if rank == 0 or not agreed:
        who = "all ranks" if agreed else f"rank {rank}"
        print(f"error ({who}, after step {step}): {cause}", file=sys.stderr, flush=True)
    return code
