"""Recomputed and offloaded activations on a GPU: the same gradients, less memory between forward and backward."""

import pytest
import torch
from torch import Tensor

from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.training.activation_checkpointing import Checkpointing, apply

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def step(checkpointing: Checkpointing, *, offload: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients, and bytes that the forward has left on the device."""
    torch.manual_seed(0)
    attention = {"alibi": True, "attn_impl": "sdpa"}
    cfg = MPTConfig(d_model=256, n_heads=4, n_layers=4, vocab_size=512, max_seq_len=512, attn_config=attention)
    model = MPT(cfg).cuda()
    apply(model, checkpointing, offload=offload)
    ids = torch.randint(0, 512, (4, 512), device="cuda")
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert loss is not None
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize(
    ("checkpointing", "offload", "share"), [("none", True, 0.6), ("full", False, 0.6), ("selective", False, 0.7),
                                            ("full", True, 0.6), ("selective", True, 0.6)]
)  # fmt: skip
def test_the_same_gradients_in_less_memory(checkpointing: Checkpointing, offload: bool, share: float) -> None:
    expected, all_of_it = step("none", offload=False)
    gradients, kept = step(checkpointing, offload=offload)
    assert kept < share * all_of_it
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-4, msg=name)
