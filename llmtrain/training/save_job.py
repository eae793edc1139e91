"""One save, from a state that was taken to a checkpoint with its name; here, or in a thread beside the training."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed
from composer import State
from composer.utils import ParallelismType, dist

from llmtrain.errors import UserError
from llmtrain.training import hashed_files
from llmtrain.training.agreement import from_all_ranks, from_rank_zero, gets_on
from llmtrain.training.checkpoint_folder import CheckpointFolder, Moment, free_space
from llmtrain.training.hashed_files import Entries, cause

_TURN = 2.0
_PATIENCE = timedelta(hours=2)
"""How long a rank waits for another that writes."""


class SaveGroups:
    """Process groups for saves alone: two threads that talk over one group mix up what they say.

    Made on all ranks at the same time (a collective call).

    Args:
        state: of the trainer; with hybrid sharding, the ranks of the first replica write.
    """

    def __init__(self, state: State) -> None:
        self.all = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self.writers: Any = self.all
        ranks = _first_replica(state)
        self.writes = ranks is None or dist.get_global_rank() in ranks
        if ranks is not None:
            self.writers = torch.distributed.new_group(ranks, backend="gloo", timeout=_PATIENCE)

    def close(self) -> None:
        """Closes them, on this rank."""
        if torch.distributed.is_initialized():
            for group in {id(g): g for g in (self.all, self.writers)}.values():
                if group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
                    torch.distributed.destroy_process_group(group)


def _first_replica(state: State) -> list[int] | None:
    mesh = state.device_mesh
    name = ParallelismType.DATA_PARALLEL_REPLICATE.value
    if not state.fsdp_sharded_state_dict_enabled or mesh is None or name not in (mesh.mesh_dim_names or ()):
        return None
    ranks: list[int] = mesh.mesh.select(mesh.mesh_dim_names.index(name), 0).flatten().tolist()
    return ranks


@dataclass
class SaveJob:
    """What is to be done; the same on all ranks but for `write`.

    Attributes:
        moment: of the checkpoint.
        write: writes this rank's files into a folder.
        last_good: the newest checkpoint before it.
        stalled: seconds for which the training has waited for it.
        beside: whether training goes on meanwhile.
    """

    moment: Moment
    write: Callable[[Any], Entries] | None
    last_good: str | None
    stalled: float = 0.0
    beside: bool = False

    def run(self, folder: CheckpointFolder, group: Any) -> str | None:
        """Saves (a collective call of `group`).

        Returns:
            Why there is no new checkpoint, the same on all ranks; None when there is one.
        """
        started = time.monotonic()
        name = self.moment.name

        def write() -> Entries:
            if self.write is None:
                return {}
            try:
                return self.write(folder.staging / name)
            except Exception as error:
                raise UserError(cause(error)) from error

        def publish() -> None:
            folder.publish(self.moment, entries)
            seconds, size = time.monotonic() - started, sum(entry.size for entry in entries.values())
            waited = f", training waited {self.stalled:.1f} s" if self.beside else ""
            line = f"checkpoint  {folder.path / name}  ({size / 1e6:,.1f} MB, {seconds:.1f} s{waited})"
            print(line, file=sys.stderr, flush=True)

        def failed() -> str:
            folder.clear()
            return free_space(folder.path)

        try:
            from_rank_zero(lambda: _plainly(lambda: folder.stage(name, self.last_good)), group)
            entries = {key: entry for part in from_all_ranks(write, group) for key, entry in part.items()}
            from_rank_zero(lambda: _plainly(publish), group)
            return None
        except UserError as error:  # the same on all ranks
            return str(error) + from_rank_zero(failed, group)


def _plainly(function: Callable[[], Any]) -> None:
    try:
        function()
    except OSError as error:
        raise UserError(cause(error)) from error


class SaveThread:
    """A save that goes on beside the training.

    Args:
        job: what is to be done.
        folder: where.
        group: of all ranks, used by nothing else meanwhile.
    """

    def __init__(self, job: SaveJob, folder: CheckpointFolder, group: Any) -> None:
        self.job = job
        self.problem: str | None = None
        self.crash: Exception | None = None
        # A daemon, so that a rank which breaks down ends; `CheckpointSaver.close` waits for a while.
        self._thread = threading.Thread(target=self._work, args=(folder, group), name="save", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank's part has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when it is done, or after some time; that bytes are written meanwhile is told."""
        until = None if seconds is None else time.monotonic() + seconds
        before = hashed_files.written
        while not self.done and (until is None or time.monotonic() < until):
            self._thread.join(_TURN if until is None else min(_TURN, max(0.0, until - time.monotonic())))
            if hashed_files.written != before:
                before = hashed_files.written
                gets_on()

    def _work(self, folder: CheckpointFolder, group: Any) -> None:
        try:
            self.problem = self.job.run(folder, group)
        except Exception as error:  # contact to another rank was lost, or a mistake of ours
            self.crash = error
