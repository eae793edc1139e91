"""Blocks compiled one by one: no graph breaks, the same numbers, and no compilation for a batch like the last."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.cache import KVCache
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import CompileConfig
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training import activation_checkpointing
from llmtrain.training.compile import KEEPS_WHAT_IT_COMPILED, compile_blocks

pytestmark = pytest.mark.skipif(
    not KEEPS_WHAT_IT_COMPILED, reason=f"torch {torch.__version__}: compile_config is refused"
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def model(n_layers: int = 3, checkpointing: Any = "none", compiled: str | None = None, **attn: Any) -> MPT:
    torch.manual_seed(3)
    shape = {"d_model": 32, "n_heads": 4, "n_layers": n_layers, "vocab_size": 64, "max_seq_len": 64, "resid_pdrop": 0.0}
    m = MPT(MPTConfig(**shape, attn_config={"alibi": True, **attn}))
    activation_checkpointing.apply(m, checkpointing)
    if compiled is not None:
        assert compile_blocks(m, CompileConfig(backend=compiled), CPU) == n_layers
    return m


def ids(seed: int, length: int = 24) -> Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(seed))


def documents(seed: int, length: int = 24) -> Tensor:
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return starts.cumsum(1)


def step(m: MPT, seed: int, length: int = 24) -> list[Tensor]:
    """Loss and gradients."""
    m.zero_grad()
    loss = m(ids(seed, length), labels=ids(seed, length), sequence_id=documents(seed, length)).loss
    assert loss is not None
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]


ATTENTION: dict[str, dict[str, Any]] = {
    "sdpa": {"attn_impl": "sdpa"},
    "eager-grouped": {"attn_impl": "eager", "attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True},
    "eager-documents": {"attn_impl": "eager", "attn_uses_sequence_id": True, "clip_qkv": 1.0},
    "blockwise": {"attn_impl": "blockwise"},
    "blockwise-documents": {"attn_impl": "blockwise", "attn_uses_sequence_id": True, "kv_n_heads": 2,
                            "attn_type": "grouped_query_attention"},
    "rope": {"attn_impl": "auto", "alibi": False, "rope": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("attention", "checkpointing"), [*((name, "none") for name in ATTENTION), ("blockwise-documents", "full")]
)
def test_compiled_is_plain(attention: str, checkpointing: str) -> None:
    """One graph for all layers (fullgraph raises at a break); none more for other contents of the same shape."""
    attn = ATTENTION[attention]
    compiled = model(checkpointing=checkpointing, compiled="aot_eager", **attn)
    plain = model(**attn)
    before = graphs()
    for seed in range(3):
        found, expected = step(compiled, seed), step(plain, seed)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if seed == 0:
            assert graphs() - before <= 1
            before = graphs()
    assert graphs() == before
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_torch_that_compiles_for_each_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.training.compile.KEEPS_WHAT_IT_COMPILED", False)
    with pytest.raises(UserError, match=r"compile_config: torch .* again for each batch; take torch 2\.11"):
        model(compiled="aot_eager")


def test_selective_checkpointing_compiles() -> None:
    compiled = model(checkpointing="selective", compiled="aot_eager", attn_impl="blockwise")
    for a, b in zip(step(compiled, 0), step(model(attn_impl="blockwise"), 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_many_layers_and_lengths_stay_compiled() -> None:
    """More layers than torch's limit of variants; a second length makes lengths variable, a third costs nothing."""
    compiled = model(n_layers=12, compiled="eager", attn_impl="blockwise", attn_uses_sequence_id=True)
    step(compiled, 0)
    step(compiled, 1, 30)
    before = graphs()
    for length in (18, 40, 33):
        step(compiled, 2, length)
    assert graphs() == before
    compiled.eval()
    with torch.no_grad():
        compiled(ids(0))
    assert graphs() == before + 1


def test_generation_with_a_cache_is_not_compiled() -> None:
    compiled, plain = model(compiled="eager").eval(), model().eval()
    before = graphs()
    with torch.no_grad():
        results = []
        for m in (compiled, plain):
            cache = KVCache(3)
            m(ids(0), cache=cache)
            results.append(m(ids(1, 1), cache=cache).logits)
    assert graphs() == before
    torch.testing.assert_close(*results)


def test_nothing_to_compile() -> None:
    m = model()
    assert compile_blocks(m, None, CPU) == 0
    assert compile_blocks(m, CompileConfig(disable=True), CPU) == 0
    assert "forward" not in vars(m.transformer.blocks[0])


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"backend: 'inducter' is not there; set it to inductor"):
        compile_blocks(model(), CompileConfig(backend="inducter"), CPU)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"install g\+\+"):
        compile_blocks(model(), CompileConfig(), CPU)


def test_documents_one_by_one_are_refused() -> None:
    with pytest.raises(UserError, match="to blockwise"):
        compile_blocks(model(attn_impl="sdpa", attn_uses_sequence_id=True), CompileConfig(), CPU)


@pytest.mark.slow
@pytest.mark.gloo_training
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_sharded_run_with_checkpointing_is_the_uncompiled_one(
    backend: str, tmp_path: Path, corpus: TinyCorpus
) -> None:
    """Two ranks, FSDP2 around compiled blocks with activation checkpointing inside: the same losses."""
    shape = {"d_model": 48, "n_heads": 3, "n_layers": 2, "no_bias": True, "vocab_size": corpus.vocab_size}
    fsdp = {"sharding_strategy": "FULL_SHARD", "activation_checkpointing": True}
    losses = []
    for name in ("plain", "compiled"):
        recipe = tiny_recipe(
            tmp_path / f"{name}.yaml",
            corpus,
            model={"name": "mpt_causal_lm", "init_device": "mixed", **shape, "attn_config": {"alibi": True}},
            fsdp_config=fsdp,
            max_duration="4ba",
            eval_interval="4ba",
            save_interval="4ba",
            compile_config={"backend": backend} if name == "compiled" else None,
        )
        run = launch(recipe, ranks=2, cwd=tmp_path, timeout=1200)
        assert run.code == 0, run.output
        losses.append(run.metrics("loss/train/total"))
    assert losses[0].keys() == losses[1].keys()
    assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), rel=1e-4)
