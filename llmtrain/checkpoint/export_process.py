"""The process that exports beside a training: ``python -m llmtrain.checkpoint.export_process REQUEST.json``.

A process and not a thread: the proof computes for seconds to minutes, and would hold the interpreter that feeds the
GPU.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llmtrain.checkpoint.exported_files import RECORD
from llmtrain.errors import UserError
from llmtrain.redaction import redact_output


@dataclass(frozen=True)
class Request:
    """What to export."""

    source: str
    """The checkpoint's folder."""
    target: str
    dtype: str
    overwrite: bool
    with_code: bool
    answer: str
    """Path of the file that tells how it went."""
    seal: dict[str, Any] | None = None
    """Of a snapshot that has no manifest yet: arguments of `snapshot.seal`."""
    push: list[str] = field(default_factory=list)
    """Where the export is copied to afterwards."""
    keep: bool = True
    """False: the target is only a stage on the way to `push`."""
    threads: int = 1
    run: str = ""
    """Name of the run that the checkpoint is of."""
    parent: int | None = None
    """Process id of the training, without which there is nothing to do."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Answer:
    """How it went."""

    problem: str | None
    """Why there is no export, or why it was not pushed; None when all is well."""
    size: int = 0
    """Bytes of the export."""
    seconds: float = 0.0
    done_before: bool = False
    """The target held this very export."""


def read_answer(path: Path) -> Answer | None:
    """None when the process ended without one."""
    try:
        return Answer(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def run(request: Request) -> Answer:
    """Export, and push; never raises."""
    started = time.monotonic()
    try:
        size, done_before = _export(request)
        return Answer(None, size, time.monotonic() - started, done_before)
    except UserError as error:
        return Answer(str(error))
    except OSError as error:
        free = f" ({shutil.disk_usage(_existing(Path(request.target))).free / 1e9:.2f} GB free there)"
        return Answer(f"{request.target}: cannot be written: {error}{free}")
    except Exception as error:
        traceback.print_exc()
        return Answer(f"{type(error).__name__}: {error}")


def _export(request: Request) -> tuple[int, bool]:
    import torch

    from llmtrain.checkpoint.export import export
    from llmtrain.checkpoint.snapshot import seal

    torch.set_num_threads(request.threads)
    source, target = Path(request.source), Path(request.target)
    if request.seal is not None:
        seal(source, **request.seal)
    options: dict[str, Any] = {"with_code": True} if request.with_code else {}
    report = export(source, target, dtype=request.dtype, overwrite=request.overwrite, **options)
    if not report.done_before:
        _record_run(target, f"{request.run}/{source.name}".lstrip("/"))
    for place in request.push:
        from llmtrain.checkpoint.push import push

        push(target, place, overwrite=request.overwrite)
    if not request.keep:
        shutil.rmtree(target)
    return report.size, report.done_before


def _record_run(target: Path, checkpoint: str) -> None:
    """The record names run and checkpoint: paths of this machine, or of a copy, mean nothing where it is pushed to."""
    file = target / RECORD
    content = json.loads(file.read_text()) | {"source": checkpoint, "target": target.name}
    temporary = file.with_name(f".{RECORD}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(file)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # runs the `finally` that removes what is half-written


def main(path: str) -> int:
    """0: exported. 1: not, as the answer says. 2: the training is gone."""
    redact_output()
    signal.signal(signal.SIGTERM, _stop)
    request = Request(**json.loads(Path(path).read_text()))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: not to outlive a training that was killed
    if request.parent is not None and os.getppid() != request.parent:  # killed before that
        return 2
    os.nice(10)
    with suppress(OSError):  # where memory runs out, the kernel shall end this process and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer = run(request)
    file = Path(request.answer)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(answer)))
    temporary.replace(file)
    return 0 if answer.problem is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
