"""Writes checkpoints that are either complete or not there."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from composer import Callback, Event, Logger, State
from composer.callbacks.checkpoint_saver import create_interval_scheduler
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import Best, write_best
from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.errors import UserError
from llmtrain.training.agreement import from_all_ranks, from_rank_zero

STAGING = ".saving"


class CheckpointSaver(Callback):  # type: ignore[misc]
    """Saves to `FOLDER/.saving/epE-baB`, adds a manifest with sizes and hashes, then renames to `FOLDER/epE-baB`.

    Composer's own saver writes in place, replaces its `latest` link in two steps, keeps no hashes and forgets at a
    resume which older checkpoints it should delete. Here `latest` is replaced by one rename, and retention looks at
    the disk. The serialisation itself is Composer's.

    Args:
        folder: where checkpoints go; the same on all ranks and nodes.
        interval: Composer time string, e.g. `100ba`; the end of training always saves.
        keep: number of newest checkpoints to keep; -1 keeps all.
        weights_only: leave the optimizer and the rest of the training state out.
        ignore_keys: glob patterns of state keys to leave out.
        record: what the manifest tells besides files: recipe, tokenizer fingerprint, attention kernel.
        refused: names of checkpoints in `folder` that were found damaged; they do not count for `keep`.
        replaces: checkpoints of an earlier run; deleted when the first new one is complete.

    Attributes:
        protected: name of the checkpoint that `best` points to; it is never deleted and does not count for `keep`.
        published_hooks: rank 0 calls each with a checkpoint's folder when that has got its final name, maybe from
            another thread than the one that trains.
        may_delete_hooks: rank 0 asks each before a checkpoint is deleted; one that says no keeps it for now.
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
        refused: Iterable[str] = (),
        replaces: Iterable[Path] = (),
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.weights_only = weights_only
        self.ignore_keys = ignore_keys
        self.record = record
        self.refused = set(refused)
        self.replaces = list(replaces)
        self._is_due = create_interval_scheduler(interval)
        self.protected: str | None = None
        self.published_hooks: list[Callable[[Path], None]] = []
        self.may_delete_hooks: list[Callable[[Path], bool]] = []
        self._due_at_epoch_end = False
        self._last_saved: tuple[int, int] | None = None
        self._wants_best: tuple[str, str, float] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Removes what a killed run left half-written, and checks that all ranks see the same folder.

        Raises:
            UserError: it cannot be written, or a node has a folder of its own under the same name.
        """
        token = self.folder / STAGING / "shared"

        def prepare() -> None:
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)
            token.parent.mkdir(parents=True)
            token.touch()

        from_rank_zero(prepare)
        unseen = [rank for rank, seen in enumerate(from_all_ranks(token.exists)) if not seen]
        if unseen:
            raise UserError(
                f"save_folder: rank(s) {unseen} do not see what rank 0 writes to {self.folder}. "
                "Give a folder on storage that all nodes share."
            )

    def wants_best(self, monitor: str, label: str, value: float) -> None:
        """The step that has just been evaluated is the best so far: it is saved when its turn comes, and linked."""
        self._wants_best = (monitor, label, value)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.BATCH_CHECKPOINT) or self._wants_best:
            if int(state.timestamp.batch_in_epoch) == state.dataloader_len:
                self._due_at_epoch_end = True  # saved in a moment, when the epoch has been counted
            else:
                self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.EPOCH_CHECKPOINT) or self._due_at_epoch_end or self._wants_best:
            self.save(state)

    def finish(self) -> None:
        """Waits for a save in flight, on all ranks (a collective call)."""

    def save(self, state: State) -> None:
        """Saves the state now, on all ranks (a collective call).

        Raises:
            UserError: on all ranks, when a rank cannot write; nothing looks complete then, and nothing was deleted.
        """
        self._due_at_epoch_end = False
        moment = (int(state.timestamp.epoch), int(state.timestamp.batch))
        name = f"ep{moment[0]}-ba{moment[1]}"
        if self._last_saved == moment:
            from_rank_zero(lambda: self._link_saved(name, moment[1]))
            self._wants_best = None
            return
        started = time.monotonic()
        staged = self.folder / STAGING / name
        sharded = bool(state.fsdp_sharded_state_dict_enabled)
        # Composer puts sharded files into a folder epE-baB beside the file name that it is given.
        target = staged.parent / "shard-rank{rank}.pt" if sharded else staged / "full.pt"
        try:
            save_checkpoint(state, str(target), weights_only=self.weights_only, ignore_keys=self.ignore_keys)
        except Exception as error:  # torch's message does not say "disk full"
            free = shutil.disk_usage(self.folder).free
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"checkpoint {self.folder / name} cannot be written ({free / 1e9:.2f} GB free): {first}"
            ) from error

        def hashes() -> dict[str, manifest.FileEntry]:
            mine = [path for path in staged.glob("*") if self._is_mine(path, sharded)]
            return {path.name: manifest.file_entry(path) for path in mine}

        entries = {key: entry for part in from_all_ranks(hashes) for key, entry in part.items()}
        kind: Literal["sharded", "full"] = "sharded" if sharded else "full"
        from_rank_zero(lambda: self._publish(state, staged, name, entries, kind))
        self._last_saved, self._wants_best = moment, None
        if dist.get_global_rank() == 0:
            size, seconds = sum(entry.size for entry in entries.values()), time.monotonic() - started
            print(
                f"checkpoint  {self.folder / name}  ({size / 1e6:,.1f} MB, {seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )

    @staticmethod
    def _is_mine(path: Path, sharded: bool) -> bool:
        """Each rank hashes the files that it wrote; rank 0 the common ones as well."""
        rank = dist.get_global_rank()
        return path.name.startswith(f"__{rank}_") or (rank == 0 and not (sharded and path.name.startswith("__")))

    def _publish(
        self,
        state: State,
        staged: Path,
        name: str,
        entries: dict[str, manifest.FileEntry],
        kind: Literal["sharded", "full"],
    ) -> None:
        manifest.write(
            staged,
            kind=kind,
            step=int(state.timestamp.batch),
            tokens=int(state.timestamp.token),
            files=entries,
            recipe=self.record["recipe"],
            tokenizer_fingerprint=self.record["tokenizer_fingerprint"],
            attention=self.record.get("attention"),
            weights_only=self.weights_only,
        )
        final = self.folder / name
        if final.exists():  # found damaged at the resume, and trained over again; or of the run that this one replaces
            final.rename(self.folder / STAGING / f"replaced-{name}")
        staged.rename(final)
        link = self.folder / STAGING / "latest"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / "latest")
        self.refused.discard(name)
        for old in self.replaces:
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        self.replaces = []
        self._link_best(name, int(state.timestamp.batch))
        for hook in self.published_hooks:
            hook(final)
        self._retain(final)
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)

    def _link_best(self, name: str, step: int) -> None:
        """Has `best` point to a checkpoint that is complete, if it is the best. Rank 0 only."""
        if self._wants_best is None:
            return
        monitor, label, value = self._wants_best
        best = Best(checkpoint=name, step=step, monitor=monitor, dataloader_label=label, value=value)
        write_best(self.folder, best, self.folder / STAGING)
        self.protected = name
        print(f"best        {label} {monitor} {value:.6g} at step {step}: {name}", file=sys.stderr, flush=True)

    def _link_saved(self, name: str, step: int) -> None:
        """The same for a checkpoint that had been saved before it was evaluated."""
        if self._wants_best is not None:
            self._link_best(name, step)
            self._retain(self.folder / name)
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)

    def _retain(self, newest: Path) -> None:
        """Deletes the oldest of the checkpoints that are good, and never the one that was just written."""
        if self.keep < 0:
            return
        good = [
            info.path
            for info in checkpoints_in(self.folder)
            if info.problem is None
            and info.path.name not in self.refused
            and info.path != newest
            and info.path.name != self.protected
        ]
        for old in good[max(self.keep, 1) - 1 :]:
            if all(may(old) for may in self.may_delete_hooks):
                shutil.rmtree(old)


def free_space_warning(folder: Path, n_parameters: int, keep: int) -> str | None:
    """One line when the disk is too small for the checkpoints to come, else None.

    A full training state is three float32 values for each parameter (weight and two moments).
    """
    need = n_parameters * 4 * 3 * ((keep if keep > 0 else 2) + 1)
    free = shutil.disk_usage(folder).free
    if free >= need:
        return None
    return (
        f"{folder} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed for the checkpoints that are kept and "
        "one being written. Free some space, or lower save_num_checkpoints_to_keep."
    )
