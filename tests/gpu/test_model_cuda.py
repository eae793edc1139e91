"""Models on a GPU with each kernel, compiled block by block or not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model.config import MPTConfig
from llmtrain.model.kernels import dense
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import CompileConfig
from llmtrain.training import activation_checkpointing
from llmtrain.training.compile import compile_blocks


def model(attn_impl: str, n_layers: int = 2, **attn: Any) -> MPT:
    torch.manual_seed(0)
    shape = {"d_model": 256, "n_heads": 4, "vocab_size": 512, "max_seq_len": 2048, "no_bias": True}
    config = MPTConfig(**shape, n_layers=n_layers, attn_config={"alibi": True, "attn_impl": attn_impl, **attn})
    return MPT(config, device="cuda")


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(seed)).cuda()


def gradients(m: MPT, length: int, dtype: torch.dtype | None, seed: int = 0) -> Tensor:
    m.zero_grad()
    documents = (torch.arange(length, device="cuda") >= length // 3 + seed).long()[None]
    with torch.autocast("cuda", dtype=dtype or torch.float32, enabled=dtype is not None):
        loss = m(ids(length, seed), labels=ids(length, seed), sequence_id=documents).loss
    assert loss is not None
    loss.backward()
    return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("attn_impl", ["flex", "sdpa", "blockwise"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_gradients(compiled: bool, attn_impl: str, checkpointing: Any) -> None:
    """In bfloat16 they are as close to float32's as those of plain eager blocks; other documents compile nothing."""
    torch._dynamo.reset()
    uses_documents = {"attn_uses_sequence_id": True}
    exact = gradients(model("eager", **uses_documents), 1024, None)
    plain = gradients(model("eager", **uses_documents), 1024, torch.bfloat16)
    m = model(attn_impl, **uses_documents)
    activation_checkpointing.apply(m, checkpointing)
    if compiled:
        assert compile_blocks(m, CompileConfig(), torch.device("cuda")) == 2
    found = gradients(m, 1024, torch.bfloat16)
    errors = [float((x - exact).norm() / exact.norm()) for x in (found, plain)]
    assert errors[0] < max(2 * errors[1], 2e-2), errors
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (1, 2):
        gradients(m, 1024, torch.bfloat16, seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("compiled", [False, True])
def test_16k_needs_no_dense_bias(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` trains 16,384 tokens with ALiBi (windows on) in the memory of a few activations."""
    torch._dynamo.reset()

    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("a dense bias")

    for module in ("sdpa", "eager"):
        monkeypatch.setattr(f"llmtrain.model.kernels.{module}.dense_bias", forbidden)
    assert dense.LONGEST < 16384
    m = model("auto")
    if compiled:
        compile_blocks(m, CompileConfig(), torch.device("cuda"))
    losses = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = m(ids(16384), labels=ids(16384)).loss
        assert loss is not None
        loss.backward()
        losses.append(float(loss))
    assert m.transformer.choice is not None
    assert m.transformer.choice.kernel.name == "flex"
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert torch.cuda.max_memory_allocated() < 4 * 2**30  # one bias of 4 heads: 2 GB in bfloat16, 4 GB in float32


def test_generation_behind_a_prompt_of_flex() -> None:
    """A long prompt goes through flex, tokens after it through a dense row: the logits are those of one forward."""
    from llmtrain.model.cache import KVCache

    m = model("auto").eval()
    with torch.no_grad():
        whole = m(ids(1300)).logits
        cache = KVCache(2)
        first = m(ids(1300)[:, :1200], cache=cache).logits
        rest = [m(ids(1300)[:, i : i + 1], cache=cache).logits for i in range(1200, 1203)]
    assert whole is not None
    found = torch.cat([x for x in (first, *rest) if x is not None], dim=1)
    torch.testing.assert_close(found, whole[:, :1203], rtol=1e-3, atol=2e-3)
