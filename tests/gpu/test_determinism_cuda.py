"""Two passes of one model are the same bits under `deterministic: true`. Not run yet on any GPU by this project."""

from typing import Any

import pytest
import torch

from llmtrain.model.config import AttentionConfig, MPTConfig
from llmtrain.model.kernels import flash
from llmtrain.model.mpt import MPT


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("attn_impl", ["auto", "eager", "sdpa", "blockwise", "flex", "flash"])
def test_gradients_are_the_same_bits(attn_impl: str, deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if attn_impl == "flash" and flash.missing() is not None:
        pytest.skip("needs flash-attn")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(0)
    attention = AttentionConfig(alibi=True, attn_impl=attn_impl)
    model = MPT(
        MPTConfig(d_model=256, n_heads=4, n_layers=2, vocab_size=512, max_seq_len=2048, attn_config=attention)
    ).cuda()
    ids = torch.randint(0, 512, (4, 2048), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
