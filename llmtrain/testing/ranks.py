"""Several gloo ranks in one line."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.torch_version import TorchVersion

GLOO_AVERAGES_GRADIENTS = TorchVersion(torch.__version__) >= "2.11"
"""Whether FSDP2 computes the right gradient on several gloo ranks; before, it summed where it should average."""


def preload() -> None:
    """Has the fork server import Composer and llmtrain once, which takes longer than most tests."""
    modules = ["llmtrain.training.train", "llmtrain.recipe.load"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def as_if_launched() -> None:
    """Called in a rank: processes that it starts in turn (a DataLoader's workers) are forked, as with the launcher.

    The start method is inherited, and each worker would come from a fork server of its own, imports and all.
    """
    multiprocessing.set_start_method("fork", force=True)


def run_ranks(function: Callable[..., Any], n_ranks: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on `n_ranks` new processes joined by gloo, and returns what each rank returned.

    Args:
        function: importable at module level (it is sent by name); finds its rank with `torch.distributed`.
        n_ranks: number of processes.
        args: sent to each of them.

    The processes are forked from the server that `llmtrain.testing.launch` uses too.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="llmtrain-ranks-") as folder:
        start_processes(  # type: ignore[no-untyped-call]
            _enter, args=(function, n_ranks, folder, args), nprocs=n_ranks, join=True, start_method="forkserver"
        )
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]
    for rank, (error, _) in enumerate(results):
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
    return [value for _, value in results]


def _enter(rank: int, function: Callable[..., Any], n_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n_ranks))
    as_if_launched()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    error, value = None, None
    try:
        value = function(*args)
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, value), Path(folder) / f"{rank}.pt")
    # A peer may wait for a rank that failed, in a collective: do not wait for it in turn. And torch 2.7 now and then
    # hangs when it takes gloo down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
