"""`save_folder: s3://...`: a run's checkpoints are written to its own folder, and sent to a store from there."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from composer import Callback, Logger, State
from composer.utils import dist

from llmtrain.checkpoint.retention import Retention
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.agreement import from_rank_zero_in_turns
from llmtrain.training.checkpoint_saver import CheckpointSaver
from llmtrain.training.preemption import Preemption
from llmtrain.training.remote_start import remote_folder
from llmtrain.training.resume import StartingPoint, save_folder
from llmtrain.training.skipped_steps import SKIPPED_STEPS
from llmtrain.training.uploader import Uploader

GRACE = 25.0
"""Seconds from a SIGTERM until uploads are given up: schedulers kill after 30."""
AFTER_A_MISTAKE = 15.0
"""The same where the run ends with an error."""


class RemoteCheckpoints(Callback):  # type: ignore[misc]
    """Has the saver's checkpoints sent by rank 0, in the background.

    Args:
        uploader: on rank 0.
        saver: of the run.
    """

    def __init__(self, uploader: Uploader | None, saver: CheckpointSaver | None) -> None:
        self.uploader = uploader
        if uploader is not None and saver is not None:
            saver.published_hooks.append(uploader.published)
            saver.may_delete_hooks.append(uploader.may_delete)

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.uploader is not None:
            self.uploader.start()

    def leave(self) -> None:
        """Gives what is on its way some seconds, after a mistake; no collective call."""
        if self.uploader is not None and self.uploader.missing():
            end = time.monotonic() + AFTER_A_MISTAKE
            if not self.uploader.wait(lambda: end):
                _say_missing(self.uploader)

    def stop(self) -> None:
        """Sends nothing more: another one takes over."""
        if self.uploader is not None:
            self.uploader.stop()

    def finish(self, callbacks: Iterable[Any]) -> int:
        """All ranks wait until everything has arrived (a collective call); after a SIGTERM no longer than its grace.

        Returns:
            0: it has. 1: it has not.
        """
        preemption = next((one for one in callbacks if isinstance(one, Preemption)), None)

        def until() -> float | None:
            if preemption is None or preemption.received_at is None:
                return None
            return preemption.received_at + GRACE

        def work() -> int:
            if self.uploader is None or self.uploader.wait(until):
                return 0
            _say_missing(self.uploader)
            return 1

        return from_rank_zero_in_turns(work, 1.0)


def build_remote_checkpoints(
    recipe: Recipe, start: StartingPoint, saver: CheckpointSaver | None
) -> RemoteCheckpoints | None:
    """The callback, or None where checkpoints stay on disks."""
    remote, folder = remote_folder(recipe), save_folder(recipe)
    if remote is None or folder is None:
        return None
    uploader = None
    if dist.get_global_rank() == 0:
        uploader = Uploader(
            remote,
            folder,
            Retention(recipe.save_num_checkpoints_to_keep, recipe.save_keep_every),
            begins=(start.step, start.epoch),
            refused=start.remote_refused,
            replaces=start.remote_replaces | {path.name for path in start.replaces},
            beside=folder.parent / SKIPPED_STEPS,
        )
    return RemoteCheckpoints(uploader, saver)


def uploads_finished(callbacks: Iterable[Any]) -> int:
    """The exit code that uploads leave a run with (a collective call): 1 where one has not arrived, else 0."""
    known = list(callbacks)
    return max((one.finish(known) for one in known if isinstance(one, RemoteCheckpoints)), default=0)


def leave_uploads(callbacks: Iterable[Any]) -> None:
    """A run ends with a mistake: what is on its way may arrive yet."""
    for one in callbacks:
        if isinstance(one, RemoteCheckpoints):
            one.leave()


def stop_uploads(callbacks: Iterable[Any]) -> None:
    """The run goes back to an earlier checkpoint: what is on its way is not wanted any more."""
    for one in callbacks:
        if isinstance(one, RemoteCheckpoints):
            one.stop()


def uploads_made_up(recipe: Recipe, start: StartingPoint) -> int:
    """Sends what a run that is complete had not sent when it ended (a collective call); the exit code."""
    uploads = build_remote_checkpoints(recipe, start, None)
    if uploads is None:
        return 0
    if uploads.uploader is not None:
        uploads.uploader.start()
    return uploads.finish([])


def _say_missing(uploader: Uploader) -> None:
    names = uploader.missing()
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    what = f"{', '.join(names[:4])}{more} of" if names else "it is not known which checkpoints of"
    what = f"{what} {uploader.folder} did not arrive" if names else f"{what} {uploader.folder} arrived"
    print(
        f"error: {what} in {uploader.remote}. Nothing is lost here; the same command sends what is missing.",
        file=sys.stderr,
        flush=True,
    )
