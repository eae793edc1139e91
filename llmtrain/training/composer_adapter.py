"""What is replaced inside Composer 0.32.1, because it does something else than we need.

Each item says what goes wrong without it and what would let it go. How checkpoints are loaded stands in `loading.py`,
put in place from here; Composer's private names are touched in these two modules only.
"""

import datetime
import functools
import os
import warnings
from dataclasses import dataclass
from typing import Any

import composer.core.state as composer_state
import composer.distributed.prepare_distributed as prepare_distributed
import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import FSDP2Config, reproducibility
from composer.utils.collect_env import get_composer_env_dict
from torch import nn

from llmtrain.training import loading
from llmtrain.training.fsdp import ShardingPlan


@dataclass
class Sharding(FSDP2Config):  # type: ignore[misc]
    """FSDP2Config with hybrid sharding, and with a planner that runs no code and says what a checkpoint lacks.

    Composer's own class has no way to ask for either: `data_parallel_replicate_degree` and `load_planner` are read-only
    properties that return None, although the mesh is built from the one and the other is used. Can go when Composer
    lets them be set.
    """

    replicate_degree: int = 1
    shard_degree: int = -1

    def __post_init__(self) -> None:
        # The parent warns at each construction that FSDP2 is experimental; docs/architecture.md says why it is used.
        pass

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicate_degree if self.replicate_degree > 1 else None

    @property
    def data_parallel_shard_degree(self) -> int:
        return self.shard_degree

    @property
    def load_planner(self) -> loading.RestrictedLoadPlanner:
        return loading.RestrictedLoadPlanner()  # a new one each time: it keeps the state that it has loaded


class RestoreRNG(Callback):  # type: ignore[misc]
    """Restores the random state on a resume in mid-epoch, on each rank.

    Composer restores it only when it replays the data loader itself. A streaming dataset resumes on its own, so neither
    of Composer's branches runs and the first batch after the resume draws the random numbers of batch 1. Here, and
    not earlier, because whatever runs before the first batch (another loader, a callback) may draw from it.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def _restore(self, state: State) -> None:
        if self.trainer is None or self.trainer._rng_state is None or "train" not in state.dataset_resumption:
            return
        reproducibility.load_rng_state(self.trainer._rng_state)
        self.trainer._rng_state = None

    def batch_start(self, state: State, logger: Logger) -> None:
        self._restore(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        # A checkpoint of an epoch's last batch resumes into an epoch that has no batch left.
        self._restore(state)


def _meta_init(module: nn.Module, param_init_fn: Any = None) -> None:
    """Materialises a sharded model from the meta device and initialises it, module by module.

    Composer's version moves to 'cuda' whatever the device is, so `init_device: meta` cannot run on a CPU.
    """
    param_init_fn = getattr(module, "param_init_fn", param_init_fn)
    for child in module.children():
        _meta_init(child, param_init_fn)
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(t.is_meta for t in tensors):
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        module.to_empty(device=device, recurse=False)
        param_init_fn(module)


def _ignore_saved_algorithms(self: State, *args: Any, **kwargs: Any) -> None:
    """Composer rebuilds the algorithms of a checkpoint with eval() of a string in it. Ours come from the recipe."""


def count_shared_samples_once(trainer: Trainer, degree: int) -> None:
    """Has the trainer count the samples and tokens of `degree` ranks that share sequences once.

    Composer adds up what all ranks got, in training and in evaluation: time in samples and tokens, the position in the
    data and tokens/s would be `degree` times too large. (It has a way of its own, numbers of samples that are floats;
    it then adds up tokens in float32, which is exact to 16 million a step only.) Losses, gradients and metrics need
    nothing: Composer averages over ranks what `MPT.forward` gives each of them.
    """
    if degree == 1:
        return
    of_all_ranks = trainer._accumulate_time_across_ranks

    def of_all_groups(*args: Any, **kwargs: Any) -> tuple[int, int, datetime.timedelta]:
        samples, tokens, elapsed = of_all_ranks(*args, **kwargs)
        return samples // degree, tokens // degree, elapsed

    trainer._accumulate_time_across_ranks = of_all_groups


_surroundings = functools.cache(get_composer_env_dict)
"""Asked for at each save; Composer takes 20 ms to look for its own commit among installed files, and finds the same."""


def install() -> None:
    """Puts the replacements in place; idempotent. Called before a Trainer is made."""
    warnings.filterwarnings("ignore", message=".*FSDP2 Config/APIs are experimental.*")
    prepare_distributed.meta_init = _meta_init
    State._apply_required_algorithms = _ignore_saved_algorithms
    composer_state.get_composer_env_dict = _surroundings
    loading.install()
    # Composer calls this for every file of a checkpoint before anything in it is unpickled.
    os.environ["CHECKPOINT_VALIDATION_FUNCTION"] = "llmtrain.checkpoint.validation.require"


def parallelism(plan: ShardingPlan) -> dict[str, Any] | None:
    """What the Trainer is told about sharding; None means DDP, or nothing on a single process.

    An instance of FSDP2Config is passed because a dict selects FSDP1 unless an environment variable says otherwise.
    """
    if not plan.is_sharded:
        return None
    return {
        "fsdp": Sharding(
            replicate_degree=plan.replicate_degree,
            reshard_after_forward=plan.reshard_after_forward,
            state_dict_type=plan.state_dict_type,
            load_monolith_rank0_only=plan.load_monolith_rank0_only,
            mixed_precision=plan.mixed_precision,
            verbose=plan.verbose,
        )
    }
