"""The folder of a run's checkpoints as rank 0 keeps it: staged, published, linked, deleted. Each is one rename."""

import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import Best, read_best, write_best
from llmtrain.checkpoint.resolve import LATEST, CheckpointInfo, checkpoints_in
from llmtrain.checkpoint.retention import Retention
from llmtrain.training.hashed_files import Entries, cause
from llmtrain.training.skipped_steps import SET_ASIDE

STAGING = ".saving"
_TOKEN = "shared"
Kind = Literal["sharded", "full"]


@dataclass(frozen=True)
class Moment:
    """What a checkpoint tells about itself besides its files."""

    epoch: int
    step: int
    tokens: int
    kind: Kind
    best: tuple[str, str, float] | None = None
    """Metric, evaluator and value, if it is the best so far."""

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return f"ep{self.epoch}-ba{self.step}"


class CheckpointFolder:
    """Used on rank 0, by one thread at a time.

    Args:
        path: `checkpoints/`.
        retention: which of them stay.
        record: what manifests tell of the run.
        weights_only: whether the checkpoints are.
        refused: names of those that were found damaged; they do not count, and are not deleted.
        replaces: of an earlier run; deleted when the first new one is complete.

    Attributes:
        protected: name of the one that `best` points to; it stays and does not count.
        published_hooks: each is called with a checkpoint that has got its final name.
        may_delete_hooks: each is asked before a checkpoint is deleted.
    """

    def __init__(
        self,
        path: Path,
        retention: Retention,
        record: dict[str, Any],
        *,
        weights_only: bool = False,
        refused: Iterable[str] = (),
        replaces: Iterable[Path] = (),
    ) -> None:
        self.path = path
        self.staging = path / STAGING
        self.retention = retention
        self.record = record
        self.weights_only = weights_only
        self.refused = set(refused)
        self.replaces = list(replaces)
        self.protected: str | None = None
        self.published_hooks: list[Callable[[Path], None]] = []
        self.may_delete_hooks: list[Callable[[Path], bool]] = []
        self._device: int | None = None

    @property
    def token(self) -> Path:
        """A file that all ranks must see."""
        return self.staging / _TOKEN

    def open(self) -> str | None:
        """Removes what a killed run left half-written, and has `latest` point to a checkpoint that is complete.

        Returns:
            The name of the newest complete checkpoint that the run may go back to.
        """
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True, exist_ok=True)  # what a process that still ends has open may have stayed
        self.token.touch()
        self._device = self.path.stat().st_dev
        good = self._good()
        link = self.path / LATEST
        if link.is_symlink() and good and link.readlink().name not in {info.path.name for info in good}:
            self._link_latest(good[0].path.name)
        own = [info.path.name for info in good if info.path not in self.replaces]
        if self.protected is None and own and (best := read_best(self.path)) is not None:
            self.protected = best.checkpoint  # of a start whose recipe had `best_checkpoint`
        return own[0] if own else None

    def close(self) -> None:
        """Removes what is not a checkpoint."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def stage(self, name: str, last_good: str | None) -> Path:
        """The place where a checkpoint is written; nothing else is left there.

        Args:
            name: of the checkpoint.
            last_good: one that lies in the folder, if the folder is what it was.

        Raises:
            OSError: the folder cannot be written, is gone, or another one has taken its place.
        """
        if self.path.stat().st_dev != self._device and last_good and not (self.path / last_good).exists():
            raise OSError(f"{last_good} is not there any more: the folder lies on another file system than before")
        self.staging.mkdir(exist_ok=True)
        self.clear()
        if last_good:
            # Once more: a delete may have failed, and what was to be sent before it goes may have arrived. Where this
            # waited for the next one to be published, a disk that such checkpoints have filled would stay full.
            self._attempt("older checkpoints were not deleted", lambda: self.retain(last_good))
            self._make_room(last_good)
        staged = self.staging / name
        staged.mkdir()
        return staged

    def clear(self) -> None:
        """Removes what is staged, which frees its space."""
        with suppress(OSError):
            for left in self.staging.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                elif left.name != _TOKEN:
                    left.unlink(missing_ok=True)

    def publish(self, moment: Moment, files: Entries) -> None:
        """Gives a staged checkpoint its manifest and its name; `latest`, `best` and retention follow.

        Raises:
            OSError: it is not published. What goes wrong after that is printed only.
        """
        staged, final = self.staging / moment.name, self.path / moment.name
        manifest.write(
            staged,
            kind=moment.kind,
            step=moment.step,
            tokens=moment.tokens,
            files=files,
            recipe=self.record["recipe"],
            tokenizer_fingerprint=self.record["tokenizer_fingerprint"],
            attention=self.record.get("attention"),
            weights_only=self.weights_only,
        )
        # Files may go while others are written: a second start of the same run empties the folder that it stages in.
        if problems := manifest.verify_sizes(staged):
            raise OSError(problems[0])
        if final.exists():  # found damaged at the resume, and trained over again; or of the run that this one replaces
            final.rename(self.staging / f"replaced-{moment.name}")
        staged.rename(final)
        manifest.sync_folder(self.path)
        self.refused.discard(moment.name)
        self._attempt("`latest` still points to the one before", lambda: self._link_latest(moment.name))
        self._attempt("it is not linked as `best`", lambda: self.link_best(moment))
        for hook in self.published_hooks:
            self._attempt("what follows a checkpoint was not done", partial(hook, final))
        self._attempt("older checkpoints were not deleted", lambda: self.retain(moment.name))
        self.clear()

    def link_best(self, moment: Moment) -> None:
        """Has `best` point to a checkpoint that is complete, if it is the best."""
        if moment.best is None:
            return
        monitor, label, value = moment.best
        best = Best(checkpoint=moment.name, step=moment.step, monitor=monitor, dataloader_label=label, value=value)
        write_best(self.path, best, self.staging)
        self.protected = moment.name
        line = f"best        {label} {monitor} {value:.6g} at step {moment.step}: {moment.name}"
        print(line, file=sys.stderr, flush=True)

    def link_saved(self, moment: Moment) -> None:
        """The same for one that had been published before it was evaluated."""
        self._attempt("it is not linked as `best`", lambda: self.link_best(moment))
        self._attempt("older checkpoints were not deleted", lambda: self.retain(moment.name))

    def retain(self, newest: str) -> None:
        """Deletes what retention does not keep; never the newest, the best, or one that was found damaged."""
        self.replaces = [old for old in self.replaces if old.name != newest]
        for old in self.replaces:
            self._attempt(f"{old.name} was not deleted", partial(self._delete, old))
        self.replaces = [old for old in self.replaces if old.exists()]
        if self.retention.keep < 0:
            return
        # A copy that somebody has given another name is theirs: it does not count, and stays.
        own = [info for info in self._good() if info.epoch >= 0 and info.path not in self.replaces]
        good = {info.path.name: (info.step, info.epoch) for info in own}
        kept = self.retention.kept(good, [self.protected] if self.protected else [])
        for name in sorted(good.keys() - kept - {newest}, key=lambda name: good[name]):  # the oldest first
            if all(may(self.path / name) for may in self.may_delete_hooks):
                self._attempt(f"{name} was not deleted", partial(self._delete, self.path / name))

    def _make_room(self, newest: str) -> None:
        """What a step back has set aside goes where the next checkpoint has no room beside it."""
        aside = self.path / SET_ASIDE
        if aside.is_dir() and no_room_beside(self.path / newest):
            names = ", ".join(sorted(path.name for path in aside.iterdir()))
            print(f"checkpoint  {aside}: {names} deleted: there is no room for the next", file=sys.stderr, flush=True)
            shutil.rmtree(aside, ignore_errors=True)

    def _good(self) -> list[CheckpointInfo]:
        return [i for i in checkpoints_in(self.path) if i.problem is None and i.path.name not in self.refused]

    def _link_latest(self, name: str) -> None:
        link = self.staging / LATEST
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.path / LATEST)
        manifest.sync_folder(self.path)

    def _delete(self, checkpoint: Path) -> None:
        """By a rename first: half of a checkpoint must not stand among the others when the run is killed here."""
        gone = self.staging / f"deleted-{checkpoint.name}"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _attempt(self, otherwise: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            print(f"warning: {self.path}: {otherwise}: {cause(error)}", file=sys.stderr, flush=True)


def no_room_beside(checkpoint: Path) -> bool:
    """Whether the disk has less space left than one more of this size takes; False where the system does not say."""
    try:
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        return shutil.disk_usage(checkpoint).free < size
    except OSError:
        return False


def free_space(folder: Path) -> str:
    """` (1.23 GB free)`, or nothing where the system does not say."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB free)"
    except OSError:
        return ""
