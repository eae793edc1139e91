"""How Composer loads checkpoints here: nothing in them is run, all ranks fail together, and errors are one message.

Composer and torch unpickle whatever a checkpoint holds: `.metadata`, the objects of a sharded checkpoint (times, random
states, callbacks), full checkpoints. A pickle is a program, and a manifest is no signature. And where one rank fails
alone, the others wait for it in a collective call until `dist_timeout`.
"""

import io
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import composer.utils.checkpoint as composer_checkpoint
from composer import Logger, State
from composer.utils import dist
from composer.utils.file_helpers import is_tar
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.checkpoint.unpickle import load_full, load_object, read_metadata
from llmtrain.errors import UserError
from llmtrain.training.agreement import from_all_ranks
from llmtrain.training.environment import say

MAY_BE_MISSING = (
    "state.callbacks.*",  # a callback that was added, or whose new version keeps more
    "state.schedulers.*._is_initial",  # of torch since 2.8
    "state.optimizers.*.decoupled_weight_decay",  # of torch since 2.7; follows from the optimizer's class
)
"""Keys of a sharded checkpoint without which a run can continue: what the run has begun with is kept."""

_composer_load_checkpoint = composer_checkpoint.load_checkpoint
_composer_download_checkpoint = composer_checkpoint.download_checkpoint
_composer_load_model_state = State.load_model_state


class RestrictedLoadPlanner(DefaultLoadPlanner):
    """torch's planner, but objects are unpickled with an allow-list, and `MAY_BE_MISSING` may be missing.

    Attributes:
        source: what messages call the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)  # what is missing is looked at below
        self.source = "the checkpoint"

    def create_local_plan(self) -> LoadPlan:
        """Torch's plan, after a look at what the checkpoint lacks.

        Raises:
            UserError: the checkpoint lacks what the run needs; names the first keys.
        """
        plan = super().create_local_plan()
        there = self.metadata.state_dict_metadata if self.metadata is not None else {}
        missing = [key for key in self.state_dict if key not in there]
        needed = [key for key in missing if not any(fnmatchcase(key, pattern) for pattern in MAY_BE_MISSING)]
        if needed:
            raise UserError(
                f"{self.source} lacks {_some(needed)}: it is of another model, optimizer or version, or holds "
                "weights only. Change the recipe back, or start a new run with load_path=... load_weights_only=true "
                "and another run_name."
            )
        if missing and self.is_coordinator:
            say(f"note: {self.source} lacks {_some(missing)}; this starts afresh, everything else continues.")
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts one object of the checkpoint into the state.

        Raises:
            UserError: it names a class or function that no checkpoint of ours needs.
        """
        key = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[key], load_object(value, f"{self.source}: `{key}`"))


def _read_metadata(self: Any) -> Metadata:
    """For Composer's readers of local folders and of object stores (where it has been downloaded to `self.path`)."""
    folder = Path(self.path)
    composer_checkpoint._ensure_valid_checkpoint(folder / ".metadata")
    metadata = read_metadata(folder)
    try:
        roots = {path[0] for path in metadata.planner_data.values()}
    except (AttributeError, TypeError, IndexError):
        raise UserError(f"{folder}: not a checkpoint of Composer's (`state` is not known).") from None
    if "optimizers" in roots:
        # Composer would read these with another planner, which unpickles freely.
        raise UserError(f"{folder}: its optimizer state has the layout of an old Composer, which is not read.")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _dcp_load(state_dict: dict[str, Any], storage_reader: Any, load_planner: Any = None) -> None:
    """Composer's version falls back to torch's own planner, and its error is one traceback a rank."""
    planner = load_planner or RestrictedLoadPlanner()
    planner.source = str(storage_reader.path)
    try:
        load(state_dict=state_dict, storage_reader=storage_reader, planner=planner)
    except CheckpointException as failed:
        failures = [(rank, error) for rank, (error, _) in sorted(failed.failures.items())]
        if not all(isinstance(error, Exception) for _, error in failures):
            raise  # interrupted
        # All ranks know all failures; one that is a message already says most.
        rank, error = next((f for f in failures if isinstance(f[1], UserError)), failures[0])
        if isinstance(error, UserError):
            raise UserError(str(error)) from None
        raise UserError(
            f"{planner.source}: cannot be loaded: it is damaged, or of another model "
            f"(rank {rank}: {type(error).__name__}: {error})"
        ) from None


def _load_file(path: Path | str, map_location: str = "cpu") -> Any:
    composer_checkpoint._ensure_valid_checkpoint(path)
    file = Path(path).resolve()  # Composer makes a link in a temporary folder
    loaded = load_full(file)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state"), dict):
        raise UserError(f"{file}: not a checkpoint of Composer's (it has no `state`).")
    return loaded


def _load_full_checkpoint(
    composer_states_filepath: Path | str, map_location: str = "cpu", load_monolith_rank0_only: bool = False
) -> dict[str, Any]:
    """The content of a full checkpoint; with `load_monolith_rank0_only`, rank 0 has tensors and the others the rest.

    Composer's version broadcasts after rank 0 has read the file: when that fails, the others wait for it.
    """
    reads = dist.get_global_rank() == 0 or not load_monolith_rank0_only
    loaded: list[Any] = [None]

    def read() -> None:
        if reads:
            loaded[0] = _load_file(composer_states_filepath)

    from_all_ranks(read)
    if load_monolith_rank0_only:
        apart = {}
        if reads:
            state = loaded[0]["state"]
            apart = {key: state[key] for key in ("model", "optimizers") if state.get(key) is not None}
            state.update(dict.fromkeys(apart))
        dist.broadcast_object_list(loaded)
        loaded[0]["state"].update(apart)
    content: dict[str, Any] = loaded[0]
    return content


def _download_checkpoint(*args: Any, **kwargs: Any) -> Any:
    """Composer's, which fails on one rank of a node only."""
    return from_all_ranks(lambda: _composer_download_checkpoint(*args, **kwargs))[dist.get_global_rank()]


def _load_model_state(
    self: State, state_dict: dict[str, Any], logger: Logger, strict: bool, *args: Any, **kw: Any
) -> None:
    """Composer's, after a look whether a full checkpoint fits: it may fail on rank 0 only, and as a traceback."""
    if not self.fsdp_sharded_state_dict_enabled:
        from_all_ranks(lambda: _check_fit(self, state_dict, strict))
    _composer_load_model_state(self, state_dict, logger, strict, *args, **kw)


def _check_fit(state: State, state_dict: dict[str, Any], strict: bool) -> None:
    if "model" not in state_dict:
        raise UserError("load_path: the checkpoint holds no model (`state/model`).")
    saved = state_dict["model"]
    if saved is None:  # rank 0 has the tensors
        return
    prefix = "module." if state.is_model_ddp else ""
    wanted = {name.removeprefix(prefix): value for name, value in state.model.state_dict().items()}
    missing = [name for name in wanted if name not in saved] if strict else []
    unknown = [name for name in saved if name not in wanted] if strict else []
    problems = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also has", unknown)) if names]
    problems += [
        f"has `{name}` of shape {list(saved[name].shape)}, not {list(value.shape)}"
        for name, value in wanted.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"load_path: the checkpoint is not of this model: it {'; it '.join(problems[:4])}. "
            "Change the recipe's `model` to the one that was saved."
        )


def _load_checkpoint(path: str, state: State, logger: Logger, object_store: Any = None, **options: Any) -> Any:
    if is_tar(path):
        raise UserError(f"load_path: {path}: archives are not read (they may write anywhere); unpack it first.")
    if state.fsdp_sharded_state_dict_enabled and object_store is None:
        # Composer reads .metadata on each rank before the first collective call.
        from_all_ranks(lambda: composer_checkpoint.FileSystemReaderWithValidation(path).read_metadata())
    return _composer_load_checkpoint(path, state, logger, object_store, **options)


def install() -> None:
    """Puts these in the place of Composer's functions; idempotent."""
    composer_checkpoint.load_checkpoint = _load_checkpoint
    composer_checkpoint.FileSystemReaderWithValidation.read_metadata = _read_metadata
    composer_checkpoint.dist_cp_load = _dcp_load
    composer_checkpoint.download_checkpoint = _download_checkpoint
    composer_checkpoint.safe_torch_load = _load_full_checkpoint
    composer_checkpoint._torch_load_with_validation = _load_file
    State.load_model_state = _load_model_state


def _some(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
