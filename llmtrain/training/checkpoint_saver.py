"""Writes checkpoints that are either complete or not there, while training goes on."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.callbacks.checkpoint_saver import create_interval_scheduler
from composer.utils import dist

from llmtrain.checkpoint.retention import Retention
from llmtrain.errors import UserError
from llmtrain.training.agreement import exchange, from_all_ranks, from_rank_zero
from llmtrain.training.checkpoint_folder import CheckpointFolder, Kind, Moment
from llmtrain.training.environment import say
from llmtrain.training.hashed_files import write_full, write_sharded
from llmtrain.training.save_failures import PAUSES, SaveFailures
from llmtrain.training.save_job import SaveGroups, SaveJob, SaveThread
from llmtrain.training.save_space import room_for_copies
from llmtrain.training.saved_state import HostMemory, KnownItems, TakenState, state_to_save

_A_MOMENT = 1.0
_AT_CLOSE = 60.0


class CheckpointSaver(Callback):  # type: ignore[misc]
    """Saves to `FOLDER/.saving/epE-baB`, adds a manifest with sizes and hashes, then renames to `FOLDER/epE-baB`.

    Composer's own saver writes in place, replaces its `latest` link in two steps, keeps no hashes and forgets at a
    resume which older checkpoints it should delete; torch's asynchronous one lets go of the trainer before objects are
    pickled. Here a sharded state is copied and pickled while training waits, and the rest (writing, hashes, manifest,
    rename, `latest`, retention) happens in a thread that talks to the other ranks over process groups of its own. At
    most one save is in flight; what becomes of it all ranks learn at the same step.

    Args:
        folder: where checkpoints go; the same on all ranks and nodes.
        interval: Composer time string, e.g. `100ba`; the end of training always saves.
        keep: number of newest checkpoints to keep; -1 keeps all.
        keep_every: a span; the first checkpoint at or after each multiple of it stays as well.
        weights_only: leave the optimizer and the rest of the training state out.
        ignore_keys: glob patterns of state keys to leave out.
        record: what the manifest tells besides files: recipe, tokenizer fingerprint, attention kernel.
        refused: names of checkpoints in `folder` that were found damaged; they do not count for `keep`.
        replaces: checkpoints of an earlier run; deleted when the first new one is complete.
        asynchronous: whether training goes on while sharded checkpoints are written.

    Attributes:
        folder: as given.
        best_lost: the best checkpoint so far could not be saved; the one before it is what `best` tells.
    """

    def __init__(
        self,
        folder: Path,
        interval: str | int,
        *,
        keep: int,
        weights_only: bool,
        ignore_keys: list[str] | None,
        record: dict[str, Any],
        keep_every: str | None = None,
        refused: Iterable[str] = (),
        replaces: Iterable[Path] = (),
        asynchronous: bool = False,
    ) -> None:
        self.folder = folder
        self.weights_only = weights_only
        self.ignore_keys = ignore_keys
        self.best_lost = False
        self._asynchronous = asynchronous
        self._kept = CheckpointFolder(
            folder,
            Retention(keep, keep_every),
            record,
            weights_only=weights_only,
            refused=refused,
            replaces=replaces,
        )
        self._is_due = create_interval_scheduler(interval)
        self._due_at_epoch_end = False
        self._last_saved: tuple[int, int] | None = None
        self._wants_best: tuple[str, str, float] | None = None
        self._memory = HostMemory()
        self._known = KnownItems()
        self._groups: SaveGroups | None = None
        self._failures = SaveFailures(folder, None, 0)
        self._in_flight: SaveThread | None = None
        self.before_hooks: list[Callable[[State], None]] = []
        """All ranks call each before they save; one that raises (on all ranks) says that this state is not saved."""

    @property
    def published_hooks(self) -> list[Callable[[Path], None]]:
        """Rank 0 calls each with a checkpoint's folder when that has got its final name, maybe from another thread."""
        return self._kept.published_hooks

    @property
    def may_delete_hooks(self) -> list[Callable[[Path], bool]]:
        """Rank 0 asks each before a checkpoint is deleted; one that says no keeps it for now."""
        return self._kept.may_delete_hooks

    @property
    def refused(self) -> set[str]:
        """Names of checkpoints that were found damaged."""
        return self._kept.refused

    @property
    def replaces(self) -> list[Path]:
        """Checkpoints of an earlier run that go with the first new one."""
        return self._kept.replaces

    @property
    def protected(self) -> str | None:
        """Name of the checkpoint that `best` points to; it is never deleted and does not count for `keep`."""
        return self._kept.protected

    @protected.setter
    def protected(self, name: str | None) -> None:
        self._kept.protected = name

    def fit_start(self, state: State, logger: Logger) -> None:
        """Removes what a killed run left half-written, and checks that all ranks see the same folder.

        Raises:
            UserError: it cannot be written, or a node has a folder of its own under the same name.
        """
        good = from_rank_zero(self._kept.open)
        unseen = [rank for rank, seen in enumerate(from_all_ranks(self._kept.token.exists)) if not seen]
        if unseen:
            raise UserError(
                f"save_folder: rank(s) {unseen} do not see what rank 0 writes to {self.folder}. "
                "Give a folder on storage that all nodes share."
            )
        self._failures = SaveFailures(self.folder, good, int(state.timestamp.batch))
        if self._groups is None:
            self._groups = SaveGroups(state)
        if self._asynchronous:
            self._asynchronous = bool(state.fsdp_sharded_state_dict_enabled) and room_for_copies(
                state, self._groups.writes, weights_only=self.weights_only
            )

    def wants_best(self, monitor: str, label: str, value: float) -> None:
        """The step that has just been evaluated is the best so far: it is saved when its turn comes, and linked."""
        self._wants_best = (monitor, label, value)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        due = self._is_due(state, Event.BATCH_CHECKPOINT)
        if self._look_after_saves(state) or due or self._wants_best:
            if int(state.timestamp.batch_in_epoch) == state.dataloader_len:
                self._due_at_epoch_end = True  # saved in a moment, when the epoch has been counted
            else:
                self._save_in_time(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.EPOCH_CHECKPOINT) or self._due_at_epoch_end or self._wants_best:
            self._save_in_time(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Nothing is in flight when a run ends."""
        self.finish()

    def close(self, state: State, logger: Logger) -> None:
        """Lets go of threads, process groups and memory; another trainer may follow in this process."""
        if self._in_flight is not None:
            self._in_flight.wait(_AT_CLOSE)  # what is nearly there is not thrown away because of what came after it
            if not self._in_flight.done:
                return
            self._in_flight = None
        if self._groups is not None:
            self._groups.close()
            self._groups = None
            if dist.get_global_rank() == 0:
                self._kept.close()
        self._memory.close()

    def finish(self) -> None:
        """Waits for a save in flight, on all ranks (a collective call).

        Raises:
            UserError: it has failed, and the run has no checkpoint.
        """
        if self._in_flight is None:
            return
        started = time.monotonic()
        self._in_flight.wait()
        self._collect()
        if (waited := time.monotonic() - started) > _A_MOMENT:
            say(f"checkpoint  training waited {waited:.1f} s until this one was written")

    def save(self, state: State) -> None:
        """Saves the state now, on all ranks (a collective call); tries a few times.

        Raises:
            UserError: on all ranks, when a rank cannot write; nothing looks complete then, and nothing was deleted.
        """
        self.finish()
        if self._is_saved(state):
            return
        moment = self._moment(state)
        self._wants_best = None
        for pause in (*PAUSES, None):
            job = self._job(state, moment, copied=self._asynchronous and torch.cuda.is_available())
            assert self._groups is not None
            problem = job.run(self._kept, self._groups.all)
            if problem is None:
                self._has_saved(moment)
                return
            if pause is None:
                raise self._failures.give_up(moment, problem)
            self._failures.failed_at_the_end(moment, problem, pause)
            time.sleep(pause)

    def _save_in_time(self, state: State) -> None:
        """Saves in mid-run, where a failure is no reason to stop; what ends a run is saved at once."""
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed >= 1.0:
            self.save(state)
            return
        self.finish()
        if self._is_saved(state):
            return
        started = time.monotonic()
        moment = self._moment(state)
        self._wants_best = None
        job = self._job(state, moment, copied=self._asynchronous)
        assert self._groups is not None
        if self._asynchronous:
            job.stalled, job.beside = time.monotonic() - started, True
            self._in_flight = SaveThread(job, self._kept, self._groups.all)
        else:
            self._judge(moment, job.run(self._kept, self._groups.all))

    def _moment(self, state: State) -> Moment:
        time = state.timestamp
        kind: Kind = "sharded" if state.fsdp_sharded_state_dict_enabled else "full"
        return Moment(int(time.epoch), int(time.batch), int(time.token), kind, self._wants_best)

    def _is_saved(self, state: State) -> bool:
        """Whether this moment has been saved; it may have turned out to be the best since then."""
        self._due_at_epoch_end = False
        moment = self._moment(state)
        if self._last_saved != (moment.epoch, moment.step):
            return False
        if moment.best is not None:
            from_rank_zero(lambda: self._kept.link_saved(moment))
        self._wants_best = None
        return True

    def _job(self, state: State, moment: Moment, *, copied: bool) -> SaveJob:
        for hook in self.before_hooks:
            hook(state)
        content = state_to_save(state, weights_only=self.weights_only, ignore_keys=self.ignore_keys, on_device=copied)
        job = SaveJob(moment, None, self._failures.last_good)
        assert self._groups is not None
        if moment.kind == "sharded" and self._groups.writes:
            taken, group = TakenState(content, self._memory if copied else None, self._known), self._groups.writers
            job.write = lambda folder: write_sharded(folder, taken, group)
        elif moment.kind == "full" and dist.get_global_rank() == 0:
            job.write = lambda folder: write_full(folder, content)
        return job

    def _look_after_saves(self, state: State) -> bool:
        """Takes notice of a save that has ended, on all ranks at the same step.

        Returns:
            Whether a save that has failed is to be tried again now.
        """
        if self._in_flight is None and not self._failures.in_a_row:
            return False
        busy = self._in_flight is not None and not self._in_flight.done
        again = dist.get_global_rank() == 0 and self._failures.time_for_another_try
        flags = state.device.tensor_to_device(torch.tensor([int(busy), int(again)], dtype=torch.int32))
        exchange(flags, "MAX")
        anywhere_busy, time_for_another = flags.tolist()
        if anywhere_busy:
            return False
        failed_now = self._in_flight is not None and self._collect()
        return bool(time_for_another) and self._failures.in_a_row > 0 and not failed_now

    def _collect(self) -> bool:
        """Takes the result of a save that has ended (a collective call).

        Returns:
            Whether it has failed.

        Raises:
            UserError: it has, and the run has no checkpoint.
            RuntimeError: ranks have lost contact.
        """
        ended, self._in_flight = self._in_flight, None
        assert ended is not None
        crash = None if ended.crash is None else f"{type(ended.crash).__name__}: {ended.crash}"
        for rank, (problem, text) in enumerate(dist.all_gather_object((ended.problem, crash))):
            if text is not None:
                raise RuntimeError(f"rank {rank}: a save broke down: {text}") from ended.crash
            ended.problem = ended.problem or problem
        return self._judge(ended.job.moment, ended.problem)

    def _judge(self, moment: Moment, problem: str | None) -> bool:
        if problem is None:
            self._has_saved(moment)
            return False
        self.best_lost = self.best_lost or moment.best is not None
        self._failures.failed(moment, problem)
        return True

    def _has_saved(self, moment: Moment) -> None:
        self._last_saved = (moment.epoch, moment.step)
        self._failures.succeeded(moment)
