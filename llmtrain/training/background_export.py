"""One export in a process of its own, seen from the training."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import llmtrain
from llmtrain.checkpoint.export_process import Answer, Request, read_answer
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.cores import available_cores

_OF_A_LAUNCH = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "NODE_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_PATIENCE = 10.0
"""Seconds that a process has to clean up after it was asked to end."""
RUN_FILES = ("tokenizer", "metrics.jsonl", "eval", "recipe.yaml")
"""What an export reads of a run, besides the checkpoint."""


class BackgroundExport:
    """A folder for a checkpoint that is not one of the run's, and the process that exports it (rank 0 alone).

    Attributes:
        target: what is being written.
        waited: seconds that the training has waited for it.
    """

    def __init__(self) -> None:
        self._made: Path | None = None
        self._given_up: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.target = Path()
        self.waited = 0.0

    def checkpoint(self, run: Path, name: str) -> Path:
        """Where a snapshot may be made: in what looks like the run, so that an export finds tokenizer and metrics."""
        beside = self._folder / "run"
        beside.mkdir()
        for file in RUN_FILES:
            (beside / file).symlink_to((run / file).absolute())
        return beside / "checkpoints" / name

    def start(self, snapshot: Snapshot | None, **request: Any) -> None:
        """Starts the process; the snapshot's memory then belongs to it alone.

        Raises:
            OSError: there is no process to be had.
        """
        asked = Request(answer=str(self._answer), threads=max(1, available_cores() // 4), parent=os.getpid(), **request)
        self.target = Path(asked.target)
        asked.write(self._folder / "request.json")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_OF_A_LAUNCH)}
        # The GPUs are the training's; and OpenMP's idle threads would spin beside it.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        # The same llmtrain as here, also where it was found beside the script that was started, and not installed.
        package = str(Path(llmtrain.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain.checkpoint.export_process", str(self._folder / "request.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=snapshot.inherited if snapshot is not None else (),
            )
        if snapshot is not None:
            snapshot.close()

    def ended(self, within: float = 0.0) -> bool:
        """Whether the process has ended, after waiting for it so many seconds at most."""
        assert self._process is not None
        started = time.monotonic()
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.waited += time.monotonic() - started if within else 0.0
        return True

    def answer(self) -> Answer:
        """How it went; once it has ended. Cleans up."""
        assert self._process is not None
        found = read_answer(self._answer)
        if self._given_up is not None:
            found = Answer(self._given_up)
        if found is None:
            tail: list[str] = []
            with suppress(OSError):  # somebody cleans up in TMPDIR
                tail = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-5:]
            code = self._process.returncode
            killed = "signal 9: perhaps there was no memory left" if code == -9 else f"signal {-code}"
            how = killed if code < 0 else f"exit code {code}"
            found = Answer("; ".join([f"the exporting process ended without an answer ({how})", *tail]))
        self._clean()
        return found

    def stop(self) -> None:
        """Ends the process and removes what it leaves; an export that is in its place already stays there."""
        self._end()
        self._clean()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def give_up(self, why: str) -> None:
        """Ends the process, which :meth:`answer` then says."""
        self._given_up = why
        self._end()

    @property
    def _folder(self) -> Path:
        """For the files of this export; made when it is needed (OSError: the disk is full, ...)."""
        if self._made is None:
            self._made = Path(tempfile.mkdtemp(prefix="export-"))
        return self._made

    @property
    def _answer(self) -> Path:
        return self._folder / "answer.json"

    def _clean(self) -> None:
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
        remove_half_written(self.target)


def remove_half_written(target: Path) -> None:
    """Deletes the hidden folders in which an export of this name was being made; nobody may be writing there."""
    if target.name:
        for left in target.parent.glob(f".{target.name}.exporting-*"):
            if (
                left / "old"
            ).is_dir() and not target.exists():  # killed between two renames: it was about to be replaced
                with suppress(OSError):
                    (left / "old").rename(target)
            shutil.rmtree(left, ignore_errors=True)
