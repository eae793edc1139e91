"""What a run does when a checkpoint cannot be written: it says so, goes on, and tries again; not before the first."""

import time
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.training.checkpoint_folder import Moment
from llmtrain.training.environment import say
from llmtrain.training.exit_codes import FAILED

PAUSES = (2.0, 4.0, 8.0)
"""Seconds between tries of the save that ends a run: within the half minute that clusters give after SIGTERM."""
FIRST_RETRY, LONGEST_RETRY = 15.0, 600.0
"""Seconds until a save in mid-run is tried again; doubled with each failure."""


class StepsLostError(UserError):
    """The last checkpoint of a run could not be written. The same command goes on from the one before."""

    exit_code = FAILED
    agreed = True


class NothingSavedError(UserError):
    """A run that has no checkpoint could not write its first one."""

    agreed = True


class SaveFailures:
    """What the saver knows of its failures; the same on all ranks, but for the clock, which is rank 0's.

    Args:
        folder: of the checkpoints.
        last_good: name of the newest complete one, if the run has any.
        step: that the run starts at.
    """

    def __init__(self, folder: Path, last_good: str | None, step: int) -> None:
        self.folder = folder
        self.last_good = last_good
        self.step = step
        self.in_a_row = 0
        self._retry_at = 0.0

    @property
    def time_for_another_try(self) -> bool:
        """Whether the pause after the last failure is over; asked on rank 0."""
        return self.in_a_row > 0 and time.monotonic() >= self._retry_at

    def succeeded(self, moment: Moment) -> None:
        """A checkpoint has been written."""
        if self.in_a_row:
            say(f"checkpoint  saving works again: {self.folder / moment.name} after {self.in_a_row} failure(s)")
        self.last_good, self.step, self.in_a_row = moment.name, moment.step, 0

    def failed(self, moment: Moment, problem: str) -> None:
        """A save in mid-run has failed.

        Raises:
            UserError: it is the first of a run that has no checkpoint at all.
        """
        self.raise_without_any(moment, problem)
        pause = min(FIRST_RETRY * 2**self.in_a_row, LONGEST_RETRY)
        self.in_a_row += 1
        self._retry_at = time.monotonic() + pause
        say(
            f"checkpoint  NOT SAVED: {self.folder / moment.name}: {problem}. Training goes on; {self.last_good} is "
            f"kept, {moment.step - self.step} step(s) behind. Tried again in {pause:.0f} s, or when the next is due."
        )

    def failed_at_the_end(self, moment: Moment, problem: str, pause: float) -> None:
        """The save that ends the run has failed, and is tried again.

        Raises:
            UserError: as for :meth:`failed`.
        """
        self.raise_without_any(moment, problem)
        say(f"checkpoint  NOT SAVED: {self.folder / moment.name}: {problem}. Tried again in {pause:.0f} s.")

    def give_up(self, moment: Moment, problem: str) -> StepsLostError:
        """The same, and it is not tried again."""
        return StepsLostError(
            f"checkpoint {self.folder / moment.name} cannot be written: {problem}. The {moment.step - self.step} "
            f"step(s) since {self.last_good} are lost. When it can be written again, the same command goes on there."
        )

    def raise_without_any(self, moment: Moment, problem: str) -> None:
        """Ends a run that has not managed one save: its folder is wrong, and nothing that it does would last.

        Raises:
            UserError: there is no checkpoint.
        """
        if self.last_good is None:
            raise NothingSavedError(
                f"checkpoint {self.folder / moment.name} cannot be written: {problem}. It is the first of this run, "
                "so nothing would be kept; mend the folder, or give another save_folder."
            )
