"""RUN/skipped_steps.json: to which checkpoints the run went back, and which steps' updates it has left out since.

Written before anything is thrown away: a run that is killed while it goes back finds here what was meant, and does it
when it starts again.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.checkpoint.best import forget_best, read_best
from llmtrain.checkpoint.resolve import LATEST, checkpoints_in
from llmtrain.config.base import Config
from llmtrain.errors import UserError
from llmtrain.json_text import parse_json

SKIPPED_STEPS = "skipped_steps.json"
SET_ASIDE = ".set-aside"
"""Folder among the checkpoints: those that the last rewind has left behind. Nothing looks for a checkpoint there."""


class RewindRecord(Config):
    """One way back."""

    reason: str
    """What was found, for a reader."""
    first: int
    """First step whose update is left out."""
    last: int
    """Last one."""
    found_at: int
    """The step at which it was found."""
    checkpoint: str
    """Name of the checkpoint that the run went back to."""
    step: int
    """Finished steps of that checkpoint."""
    when: str
    """UTC, ISO 8601."""
    done: bool = False
    """Whether later checkpoints have been set aside. Only then may new ones of the same names be written."""
    set_aside: tuple[str, ...] = ()
    """Their names."""


class _Content(Config):
    rewinds: tuple[RewindRecord, ...] = ()


def read(run: Path) -> list[RewindRecord]:
    """The rewinds of a run, in their order.

    Raises:
        UserError: the file cannot be read.
    """
    file = run / SKIPPED_STEPS
    if not file.exists():
        return []
    try:
        body = file.read_bytes()
    except OSError as problem:
        raise _unreadable(str(file), problem) from problem
    return parse(body, str(file))


def parse(body: bytes, where: str) -> list[RewindRecord]:
    """The rewinds in the content of such a file.

    Args:
        body: the content.
        where: the file, for the message.

    Raises:
        UserError: it is none.
    """
    try:
        return list(_Content.model_validate(parse_json(body.decode())).rewinds)
    except (ValueError, ValidationError) as problem:
        raise _unreadable(where, problem) from problem


def _unreadable(where: str, problem: Exception) -> UserError:
    return UserError(
        f"{where} cannot be read ({str(problem).splitlines()[0]}), and it says which steps this run leaves out. "
        "Restore it; or remove it to train these steps."
    )


def is_left_out(rewinds: list[RewindRecord], step: int) -> RewindRecord | None:
    """The rewind that leaves out the update of a step (counted from 1), or None."""
    return next((rewind for rewind in rewinds if rewind.first <= step <= rewind.last), None)


def add(run: Path, rewind: RewindRecord) -> None:
    """Put a rewind into the file, on the disk when this returns. Rank 0 only."""
    write(run, [*read(run), rewind])


def finish(run: Path, checkpoints: Path | None) -> list[str]:
    """Do what the last rewind has left to do: set aside the checkpoints after the one that it goes back to.

    Rank 0 only, before anybody looks for the newest checkpoint.

    Returns:
        The names of those that were set aside, in this or an earlier attempt; empty when nothing was left to do.

    Raises:
        UserError: the checkpoint that it goes back to is gone; nothing was changed.
    """
    rewinds = read(run)
    if not rewinds or rewinds[-1].done or checkpoints is None:
        return []
    rewind = rewinds[-1]
    if not (checkpoints / rewind.checkpoint).is_dir():
        raise UserError(
            f"{run / SKIPPED_STEPS}: the run was going back to {checkpoints / rewind.checkpoint}, which is not there. "
            "Restore it; or remove the file to go on from the newest checkpoint, with the spike in it."
        )
    later = [info.path for info in checkpoints_in(checkpoints) if info.step > rewind.step]
    place = checkpoints / SET_ASIDE
    named = sorted({*rewind.set_aside, *(path.name for path in later)})
    if not rewind.set_aside:  # the first attempt: what lies there is of an earlier rewind
        shutil.rmtree(place, ignore_errors=True)
    write(run, [*rewinds[:-1], rewind.model_copy(update={"set_aside": tuple(named)})])
    if later:
        place.mkdir(exist_ok=True)
    temporary = checkpoints / f".{LATEST}.rewinding"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(rewind.checkpoint)
    temporary.replace(checkpoints / LATEST)
    best = read_best(checkpoints)
    if best is not None and best.step > rewind.step:
        forget_best(checkpoints)
    for path in later:
        shutil.rmtree(place / path.name, ignore_errors=True)
        path.rename(place / path.name)
    write(run, [*rewinds[:-1], rewind.model_copy(update={"set_aside": tuple(named), "done": True})])
    return named


def of_run(run: Path, *, anew: bool) -> list[RewindRecord]:
    """The rewinds of a run that starts now. Where it begins anew, those of an earlier one of its name are forgotten."""
    if anew:
        (run / SKIPPED_STEPS).unlink(missing_ok=True)
    return read(run)


def write(run: Path, rewinds: list[RewindRecord]) -> None:
    """Replace the file; it is on the disk when this returns."""
    write_json(run / SKIPPED_STEPS, _Content(rewinds=tuple(rewinds)).model_dump())


def write_json(file: Path, content: Any) -> None:
    """Replace a file in one step; it is on the disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
