"""A unit of work as another engine's worker does it: a process that did not start in the command's folder."""

import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.prep.engines import Task
from llmtrain.prep.job import Job
from llmtrain.prep.work import PLAN

_MISTAKE = "llmtrain's UserError: "


class Mistake(RuntimeError):
    """A `UserError` on its way to the command, through engines that hand on nothing but an exception's text."""

    def __init__(self, message: str) -> None:
        super().__init__(_MISTAKE + json.dumps(message))


def mistake_in(text: str) -> UserError | None:
    """The `UserError` whose `Mistake` is quoted in a text, for example a traceback; None when there is none."""
    found = re.search(re.escape(_MISTAKE) + r'("(?:[^"\\]|\\.)*")', text)
    return None if found is None else UserError(json.loads(found[1]))


@dataclass(frozen=True)
class Unit:
    """Does units of a task on whatever machine it finds itself."""

    task: Task
    folder: str
    """Where the command was started; what a recipe names by a relative path is looked for there."""
    path: tuple[str, ...]
    """The command's `sys.path`, for functions of the user's own that stages call."""

    @classmethod
    def of(cls, task: Task) -> "Unit":
        """The task as this process, which is the command's, would do it."""
        return cls(task, os.getcwd(), tuple(os.path.abspath(place) for place in sys.path))  # noqa: PTH100, PTH109

    def __call__(self, number: int) -> int:
        """Do one; returns the bytes of text that were read.

        Raises:
            Mistake: it raised `UserError`, or the unfinished output cannot be seen from here.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the engine shares out the cores
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        sys.path += [place for place in self.path if place not in sys.path]
        done = 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes

        try:
            self._require_plan()
            self.task(number, advance)
        except UserError as mistake:
            raise Mistake(str(mistake)) from mistake
        return done

    def _require_plan(self) -> None:
        """The plan was written before any unit was given away: a worker without it looks at another disk."""
        for argument in getattr(self.task, "args", ()):
            if isinstance(argument, Job) and argument.work().read(PLAN) is None:
                raise UserError(
                    f"out: the worker on {socket.gethostname()} does not see the unfinished output of {argument.out}. "
                    "Every worker needs the same folder there: a file system that all of them mount, or a URL "
                    "(s3://BUCKET/FOLDER)"
                )
