"""Writes checkpoints that are either complete or not there."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from composer import Callback, Event, Logger, State
from composer.callbacks.checkpoint_saver import create_interval_scheduler
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.resolve import checkpoints_in

STAGING = ".saving"


class CheckpointSaver(Callback):  # type: ignore[misc]
    """Saves to `FOLDER/.saving/epE-baB`, adds a manifest with sizes and hashes, then renames to `FOLDER/epE-baB`.

    Composer's own saver writes in place, replaces its `latest` link in two steps, keeps no hashes and forgets at a
    resume which older checkpoints it should delete. Here `latest` is replaced by one rename, and retention looks at
    the disk. The serialisation itself is Composer's.

    Args:
        folder: where checkpoints go; the same on all ranks.
        interval: Composer time string, e.g. `100ba`; the end of training always saves.
        keep: number of newest checkpoints to keep; -1 keeps all.
        weights_only: leave the optimizer and the rest of the training state out.
        ignore_keys: glob patterns of state keys to leave out.
        record: what the manifest tells besides files: recipe, tokenizer fingerprint.
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
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.weights_only = weights_only
        self.ignore_keys = ignore_keys
        self.record = record
        self.save_now = False
        self._is_due = create_interval_scheduler(interval)
        self._last_saved: int | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)  # what a killed run left half-written
        dist.barrier()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.save_now or self._is_due(state, Event.BATCH_CHECKPOINT):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.EPOCH_CHECKPOINT):
            self.save(state)

    def save(self, state: State) -> None:
        """Saves the state now, on all ranks (a collective call)."""
        step = int(state.timestamp.batch)
        if self._last_saved == step:
            return
        name = f"ep{int(state.timestamp.epoch)}-ba{step}"
        staged = self.folder / STAGING / name
        sharded = bool(state.fsdp_sharded_state_dict_enabled)
        # Composer puts sharded files into a folder epE-baB beside the file name that it is given.
        target = staged.parent / "shard-rank{rank}.pt" if sharded else staged / "full.pt"
        save_checkpoint(state, str(target), weights_only=self.weights_only, ignore_keys=self.ignore_keys)

        mine = [path for path in staged.glob("*") if self._is_mine(path, sharded)] if staged.exists() else []
        entries: dict[str, manifest.FileEntry] = {}
        for part in dist.all_gather_object({path.name: manifest.file_entry(path) for path in mine}):
            entries.update(part)
        if dist.get_global_rank() == 0:
            self._publish(state, staged, name, entries, "sharded" if sharded else "full")
        dist.barrier()
        self._last_saved = step

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
        )
        final = self.folder / name
        if final.exists():  # found damaged at the resume, and trained over again
            final.rename(self.folder / STAGING / f"replaced-{name}")
        staged.rename(final)
        link = self.folder / STAGING / "latest"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / "latest")
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)
        if self.keep >= 0:
            for old in checkpoints_in(self.folder)[max(self.keep, 1) :]:
                shutil.rmtree(old.path)
        size = sum(entry.size for entry in entries.values())
        print(f"checkpoint  {final}  ({size / 1e6:,.1f} MB)", file=sys.stderr, flush=True)


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
