"""Several gloo ranks in one line."""

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes
from torch.torch_version import TorchVersion

from llmtrain.certify.processes import as_if_launched as as_if_launched
from llmtrain.certify.processes import preload as preload

GLOO_AVERAGES_GRADIENTS = TorchVersion(torch.__version__) >= "2.11"
"""Whether FSDP2 computes the right gradient on several gloo ranks; before, it summed where it should average."""

_PATIENCE = 600


def run_ranks(function: Callable[..., Any], n_ranks: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on `n_ranks` new processes joined by gloo, and returns what each rank returned.

    Args:
        function: importable at module level (it is sent by name); finds its rank with `torch.distributed`.
        n_ranks: number of processes.
        args: sent to each of them.

    The processes are forked from the server that `llmtrain.testing.launch` uses too. When one fails, the others are
    ended: they may wait for it where nothing tells them.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
        TimeoutError: the ranks, which are ended then, took longer than ten minutes.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="llmtrain-ranks-") as name:
        folder = Path(name)
        ranks: Any = start_processes(  # type: ignore[no-untyped-call]
            _enter, args=(function, n_ranks, name, args), nprocs=n_ranks, join=False, start_method="forkserver"
        )
        try:
            _wait(ranks)
        except ProcessExitedException:
            failures = [torch.load(path, weights_only=False) for path in folder.glob("*.failed")]
            if not failures:
                raise
            _, rank, error = min(failures)
            raise RuntimeError(f"rank {rank} failed:\n{error}") from None
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _wait(ranks: Any) -> None:
    give_up = time.monotonic() + _PATIENCE
    while not ranks.join(timeout=1):
        if time.monotonic() > give_up:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{len(ranks.processes)} ranks did not finish within {_PATIENCE} s")


def _enter(rank: int, function: Callable[..., Any], n_ranks: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n_ranks))
    as_if_launched()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks)
    code = 0
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
    except BaseException:
        code = 1
        file = Path(folder) / f"{rank}.failing"
        torch.save((time.monotonic(), rank, traceback.format_exc()), file)
        file.rename(file.with_suffix(".failed"))  # whole, also where this rank is ended just now
    # A peer may wait for a rank that failed, in a collective: do not wait for it in turn. And torch 2.7 now and then
    # hangs when it takes gloo down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
