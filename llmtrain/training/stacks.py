"""Where the threads of this process are, for people who ask why a run stands still."""

import faulthandler
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import llmtrain

_OURS = str(Path(llmtrain.__file__).parent)
_WRAPPERS = {"wrapper", "wrapped", "decorate_context", "inner", "__call__", "wait", "__torch_dispatch__", "_fn"}

Kind = Literal["collective", "data", "save", "code"]


@dataclass(frozen=True)
class Place:
    """What the main thread does.

    Attributes:
        kind: waits for other ranks in a collective call, for data, writes a checkpoint, or something else.
        text: the same in words, with the innermost line of ours or of the user's.
    """

    kind: Kind
    text: str


def main_place() -> Place:
    """Where the main thread of this process is now."""
    frames = sys._current_frames()
    stack = _stack(frames.get(threading.main_thread().ident or 0))
    if stack and stack[0].f_code.co_name == "_engine_run_backward":
        # On a GPU, backward runs in a thread of autograd's, which may be the one that waits.
        for ident, frame in frames.items():
            if ident != threading.main_thread().ident and _collective(other := _stack(frame)):
                return place_of([*other, *stack])
    return place_of(stack)


def place_of(stack: list[FrameType]) -> Place:
    """What a thread does, from its frames, the innermost first."""
    if not stack:
        return Place("code", "has no frame of Python")
    own = next((frame for frame in stack if _is_own(frame)), stack[0])
    at = f"{_short(own)}:{own.f_lineno} in {own.f_code.co_name}"
    if name := _collective(stack):
        return Place("collective", f"waits in {name}, {at}")
    files = [frame.f_code.co_filename.replace("\\", "/") for frame in stack]
    if any("/torch/utils/data/" in file or "/llmtrain/data/" in file or "/streaming/base/" in file for file in files):
        return Place("data", f"reads data, {at}")
    if any("checkpoint_saver" in file or "/torch/distributed/checkpoint/" in file for file in files):
        return Place("save", f"writes a checkpoint, {at}")
    return Place("code", f"is in {at}" if own.f_code.co_filename.startswith(_OURS) else f"is in user code, {at}")


def dump(path: Path) -> None:
    """Writes the stacks of all threads to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def show_on_signal() -> None:
    """From now on, SIGUSR1 prints the stacks of all threads to stderr, also of a process that is stuck in C."""
    if threading.current_thread() is threading.main_thread():
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr, all_threads=True, chain=False)


def _stack(frame: FrameType | None) -> list[FrameType]:
    stack = []
    while frame is not None:
        if frame.f_code.co_filename != __file__:  # where the main thread asks about itself
            stack.append(frame)
        frame = frame.f_back
    return stack


def _collective(stack: list[FrameType]) -> str | None:
    """Name of the collective call that the innermost frames are in, if they are in one."""
    names = []
    for frame in stack:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/torch/distributed/" in file and "/distributed/tensor/" not in file and "/checkpoint/" not in file:
            names.append(frame.f_code.co_name)
        elif "/torch/" not in file and "/composer/utils/dist.py" not in file:
            break
    return next((name for name in names if name not in _WRAPPERS), names[0] if names else None)


def _is_own(frame: FrameType) -> bool:
    """Whether a frame is of llmtrain or of the user: of no package that is installed, and not of Python."""
    file = frame.f_code.co_filename
    if file.startswith(_OURS):
        return True
    return not (file.startswith(("<", sys.prefix, sys.base_prefix)) or "-packages/" in file)


def _short(frame: FrameType) -> str:
    """The last two parts of a file's name."""
    return "/".join(Path(frame.f_code.co_filename).parts[-2:])
