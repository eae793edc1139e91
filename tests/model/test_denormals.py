"""Denormals become zero in every thread, and attention computes the same."""

import subprocess
import sys

import pytest
import torch

from llmtrain.model import alibi
from llmtrain.model.kernels.blockwise import BLOCKWISE
from llmtrain.model.kernels.interface import Attention, Visibility

WORKERS = """
import torch
from llmtrain.model.kernels.denormals import flush_denormals
torch.set_num_threads(4)
{flush}
products = torch.full((4, 1 << 18), 1e-30) * 1e-10
print((products != 0).any(1).tolist())
"""


@pytest.mark.parametrize(("flush", "some"), [("flush_denormals()", False), ("", True)], ids=["flushed", "kept"])
def test_in_every_thread(flush: str, some: bool) -> None:
    script = WORKERS.format(flush=flush)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    if flush and "True" in out and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    assert out.strip() == str([some] * 4)


def test_results_agree() -> None:
    """Slopes up to 0.8 over 600 keys: far weights are e^-480, below the smallest normal number."""
    generator = torch.Generator().manual_seed(0)
    seen = Visibility(600, 600, torch.device("cpu"), torch.float32, slopes=(0.8, *alibi.slopes(3)), skip_far_keys=False)
    results = []
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        try:
            q, k, v = torch.randn(3, 1, 4, 600, 16, generator=generator.manual_seed(0)).requires_grad_().unbind()
            out = Attention(BLOCKWISE, BLOCKWISE.prepare(seen))(q, k, v, softmax_scale=0.25)
            results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
        finally:
            torch.set_flush_denormal(False)
    for flushed, kept in zip(*results, strict=True):
        torch.testing.assert_close(flushed, kept, rtol=1e-6, atol=1e-30)
