"""The part of a run's start that looks into a store: what lies there, and what is fetched from there."""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from composer.utils import dist
from rich.console import Console

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.best import RECORD, read_best
from llmtrain.checkpoint.remote import SET_ASIDE, RemoteCheckpoint, RemoteFolder, Unreachable, at_the_start
from llmtrain.checkpoint.remote_download import download
from llmtrain.checkpoint.resolve import CheckpointInfo, first_usable, step_and_epoch
from llmtrain.errors import UserError
from llmtrain.prep.stores.store import StoredFile
from llmtrain.progress import progress
from llmtrain.recipe.recipe import Recipe
from llmtrain.training import skipped_steps
from llmtrain.training.agreement import (
    from_all_ranks,
    from_all_ranks_in_turns,
    from_rank_zero,
    from_rank_zero_in_turns,
)
from llmtrain.training.environment import say

STORES = ("s3", "gs", "azure", "sftp")
_TURN = 1.0
"""Seconds between the collective calls in which ranks wait for a store."""
_FOREIGN = re.compile(r"[^/]*rank\d+[^/]*\.pt")


@dataclass(frozen=True)
class RemoteInfo(CheckpointInfo):
    """A checkpoint in a store; `path` is where it comes to lie on this machine."""

    there: RemoteCheckpoint


def remote_folder(recipe: Recipe) -> RemoteFolder | None:
    """Where the recipe's checkpoints are sent, with `{run_name}` filled in; None when they stay on disks.

    Raises:
        UserError: the URL is of no store that llmtrain knows, or names no place in it.
    """
    if recipe.save_folder is None or "://" not in recipe.save_folder:
        return None
    try:
        return RemoteFolder(recipe.save_folder.replace("{run_name}", recipe.run_name))
    except UserError as error:
        raise UserError(f"save_folder: {error}") from None


def place_of_checkpoints(recipe: Recipe) -> list[str]:
    """Whether checkpoints can be sent where the recipe wants them, in a line; [] where they stay on disks.

    Raises:
        UserError: they cannot.
    """
    remote = remote_folder(recipe)
    if remote is None:
        return []
    try:
        at_the_start(remote.try_out, f"save_folder: {remote}")
    except Unreachable as problem:
        raise UserError(f"save_folder: {remote} does not answer: {problem}") from None
    return [f"save_folder: {remote}: can be written, read and deleted from"]


def look(remote: RemoteFolder, folder: Path, *, must: bool) -> list[RemoteInfo] | None:
    """Tries whether the store can be written, and lists the checkpoints there (a collective call).

    Args:
        remote: where the run's checkpoints are sent.
        folder: `checkpoints/` of the run on this machine.
        must: whether a store that does not answer is an error; otherwise it is a warning.

    Returns:
        The newest first; None where the store does not answer.

    Raises:
        UserError: it cannot be used; or another trainer's checkpoints lie there, and none of ours.
    """

    def listed() -> list[RemoteCheckpoint] | None:
        def attempt() -> list[RemoteCheckpoint]:
            remote.try_out()
            _set_aside(remote, folder)
            found = remote.checkpoints()
            if not any(one.has_manifest for one in found):
                _refuse_foreign(remote)
            return found

        try:
            return at_the_start(attempt, f"save_folder: {remote}")
        except Unreachable as problem:
            if must:
                raise UserError(
                    f"save_folder: {remote} does not answer: {problem}. Nothing was changed. Start the run again when "
                    "it does, or save to a folder on this machine."
                ) from None
            say(
                f"warning: save_folder: {remote} does not answer: {problem}. The run continues from what is on this "
                "machine, and goes on trying to send its checkpoints."
            )
            return None

    found = from_rank_zero_in_turns(listed, _TURN)
    if found is None:
        return None
    for one in found:
        if one.was_cut_off:
            say(f"note: {one.name} in {remote} was never sent to its end; it is not used.")
    return [_info(remote, folder, one) for one in found if not one.was_cut_off and not one.was_set_aside]


def _set_aside(remote: RemoteFolder, folder: Path) -> None:
    """Marks in the store what the run's last step back has set aside on this machine."""
    rewinds = skipped_steps.read(folder.parent)
    for name in rewinds[-1].set_aside if rewinds else ():
        ours = folder / skipped_steps.SET_ASIDE / name / manifest.MANIFEST
        there = remote.checkpoint(name)
        if not ours.is_file() or not there.is_offered:
            continue
        body = ours.read_bytes()
        stored = there.files[manifest.MANIFEST]
        if stored.size == len(body) and remote.read(stored, len(body)) == body:
            remote.put(f"{name}/{SET_ASIDE}", b"")


def fetch_skipped_steps(remote: RemoteFolder, run: Path) -> None:
    """Which steps the run leaves out, where it continues on another machine (a collective call).

    A list on this machine holds unless the run has gone back once more elsewhere.

    Raises:
        UserError: the store does not answer, or not with such a file.
    """

    def fetch() -> None:
        ours = len(skipped_steps.read(run))
        try:
            path = remote.path + skipped_steps.SKIPPED_STEPS
            body = at_the_start(lambda: remote.read(_stat(remote, path), 1 << 24), f"save_folder: {remote}")
        except Unreachable as problem:
            raise UserError(f"save_folder: {remote} does not answer: {problem}") from None
        except ValueError as problem:
            raise UserError(f"save_folder: {remote}: {problem}") from None
        if body and len(theirs := skipped_steps.parse(body, f"{remote}/{skipped_steps.SKIPPED_STEPS}")) > ours:
            skipped_steps.write(run, theirs)

    from_rank_zero_in_turns(fetch, _TURN)


def _stat(remote: RemoteFolder, path: str) -> StoredFile:
    """A file that may be missing: of no bytes then."""
    try:
        return remote.store.stat(path)
    except FileNotFoundError:
        return StoredFile(path, 0, 0, "")


def _info(remote: RemoteFolder, folder: Path, one: RemoteCheckpoint) -> RemoteInfo:
    problem = None if one.has_manifest else f"no {manifest.MANIFEST} in {remote}: it is no checkpoint of llmtrain's"
    return RemoteInfo(folder / one.name, one.step, one.epoch, None, problem, one)


def _refuse_foreign(remote: RemoteFolder) -> None:
    with suppress(FileNotFoundError):
        for file in remote.store.files(remote.path, 0):
            name = file.path.removeprefix(remote.path)
            if _FOREIGN.fullmatch(name):
                raise UserError(
                    f"{remote} holds another trainer's checkpoints ({name}). To start from one, give it as load_path "
                    "and choose another save_folder or run_name."
                )


def fetch_together(remote: RemoteFolder, there: RemoteCheckpoint, folder: Path) -> list[str]:
    """Fetches a checkpoint to `folder/NAME` of each node; once where nodes share a disk (a collective call).

    Returns:
        What is wrong with it, a line each; the same on all ranks.

    Raises:
        UserError: a node's disk is full, or cannot be written.
    """
    token = from_rank_zero(lambda: f".shared-{uuid.uuid4().hex[:8]}")

    def mark() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()

    from_rank_zero(mark)
    sees = from_all_ranks((folder / token).exists)[dist.get_global_rank()]
    from_rank_zero(lambda: (folder / token).unlink(missing_ok=True))
    fetches = dist.get_global_rank() == 0 or (dist.get_local_rank() == 0 and not sees)
    began = time.monotonic()

    def work() -> list[str]:
        if not fetches:
            return []
        console = Console(stderr=True, quiet=dist.get_global_rank() > 0)
        try:
            with progress(console, f"fetching {there.name}", there.size, "bytes") as advance:
                return download(remote, there, folder, advance)
        except Unreachable as problem:
            return [f"it cannot be fetched now: {problem}"]

    found = from_all_ranks_in_turns(work, _TURN)
    problems = list(dict.fromkeys(problem for each in found for problem in each))
    if not problems:
        say(
            f"fetched     {there.name} from {remote} to {folder}  "
            f"({there.size / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s, every file's hash compared)"
        )
    return problems


def fetch_best(remote: RemoteFolder, infos: Iterable[RemoteInfo], folder: Path, step: int) -> None:
    """Fetches the best checkpoint as well, so that a run on a new machine knows what it has to beat (collective).

    Args:
        remote: where the run's checkpoints are.
        infos: what lies there.
        folder: `checkpoints/` of the run on this machine.
        step: where the run continues; a best one beyond that is not its own.
    """
    by_name = {info.path.name: info for info in infos if info.problem is None}

    def known() -> tuple[str, str] | None:
        if read_best(folder) is not None:
            return None
        with suppress(OSError, UserError):
            best = remote.best()
            if best is not None and best.checkpoint in by_name and best.step <= step:
                return best.checkpoint, best.model_dump_json(indent=1)
        return None

    found = from_rank_zero_in_turns(known, _TURN)
    if found is None:
        return
    name, record = found
    intact = from_rank_zero(lambda: not manifest.verify_sizes(folder / name))
    if not intact and (problems := fetch_together(remote, by_name[name].there, folder)):
        say(f"best_checkpoint: {name} in {remote} is not taken: {problems[0]}")
        return

    def write() -> None:  # the callback makes the link
        temporary = folder / f".{RECORD}.writing"
        temporary.write_text(record + "\n", encoding="utf-8")
        temporary.replace(folder / RECORD)

    from_rank_zero(write)


def fetch_load_path(url: str) -> Path | None:
    """A checkpoint of llmtrain's that `load_path` names in a store, on this machine (a collective call).

    Args:
        url: of a checkpoint, or of a folder of checkpoints, which means the newest sound one.

    Returns:
        Its folder in `$XDG_CACHE_HOME/llmtrain/checkpoints`; None where no manifest lies there: it is not ours.

    Raises:
        UserError: the store cannot be read, or what lies there is damaged.
    """
    url = url.rstrip("/")
    above, _, last = url.rpartition("/")
    is_one = step_and_epoch(last) is not None
    if url.partition("://")[0] not in STORES or last.endswith(".pt"):
        return None
    try:
        remote = RemoteFolder(above if is_one else url)
    except UserError as error:
        raise UserError(f"load_path: {error}") from None

    def listed() -> list[RemoteCheckpoint]:
        try:
            found = at_the_start(
                lambda: [remote.checkpoint(last)] if is_one else remote.checkpoints(), f"load_path: {remote}"
            )
        except Unreachable as problem:
            raise UserError(f"load_path: {remote} does not answer: {problem}") from None
        return [one for one in found if one.is_offered]

    found = from_rank_zero_in_turns(listed, _TURN)
    if not found:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "llmtrain" / "checkpoints"
    folder = cache / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    by_name = {one.name: one for one in found}
    infos = [_info(remote, folder, one) for one in found]
    newest, _ = first_usable(infos, lambda info: fetch_together(remote, by_name[info.path.name], folder), say)
    if newest is None:
        raise UserError(f"load_path: {remote} holds no sound checkpoint (see above).")
    return newest.path
