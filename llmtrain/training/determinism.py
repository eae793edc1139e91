"""`deterministic: true`: each operation gives the same bits each time, or the run ends and names one that cannot.

Without it, the same run on the same CPUs gives the same bits anyway; on GPUs, the backward pass of attention and of
embeddings adds in the order in which threads come. See docs/determinism.md.
"""

import os

import torch

from llmtrain.errors import UserError
from llmtrain.recipe.recipe import Recipe

CUBLAS = ":4096:8"
"""cuBLAS's workspaces, a fixed set of them for each stream; the other deterministic one, `:16:8`, is slower."""
_ENVIRONMENT = {
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers' models: the backward pass of flash-attn
    "NCCL_ALGO": "Ring",  # one order of additions, whatever NCCL's tuning of the moment says
    "NCCL_NVLS_ENABLE": "0",  # sums in the switch
    "PYTHONHASHSEED": "0",  # of processes that are started from here on
}


def set_determinism(recipe: Recipe) -> None:
    """Asks torch for deterministic operations, if the recipe does; before anything touches a GPU.

    What the environment says already is kept.

    Raises:
        UserError: the environment asks cuBLAS for workspaces that make its results vary.
    """
    if not recipe.deterministic:
        return
    given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    if given not in (CUBLAS, ":16:8"):
        raise UserError(
            f"deterministic: the environment has CUBLAS_WORKSPACE_CONFIG={given}, with which cuBLAS's results vary. "
            f"Unset it, or set it to {CUBLAS}."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # Memory that nobody has written is not read here; filling it would cost a pass over each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # chooses by time
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass has no such mode everywhere
    _set_inductor()


def _set_inductor() -> None:
    """Compiled code: kernels are chosen by rule, not by timing them (torch 2.9 and later have a switch)."""
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
