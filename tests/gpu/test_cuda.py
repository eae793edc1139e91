"""What only a CUDA device can show; skipped elsewhere. Run with: python -m pytest tests/gpu"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmtrain.model.config import AttentionConfig, InitConfig, MPTConfig
from llmtrain.model.loss import chunked_cross_entropy
from llmtrain.model.mpt import MPT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def config(**changes: Any) -> MPTConfig:
    shape = {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 512, "max_seq_len": 512, "no_bias": True}
    attention = AttentionConfig(alibi=True, **changes.pop("attn_config", {}))
    return MPTConfig(**{**shape, **changes}, attn_config=attention, init_config=InitConfig(emb_init_std=0.02))


def ids(batch: int = 2, length: int = 512) -> torch.Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padded", [False, True])
def test_float32_logits_are_those_of_the_cpu_in_float64(padded: bool) -> None:
    torch.manual_seed(0)
    model = MPT(config())
    mask = torch.ones(2, 512, dtype=torch.bool)
    if padded:
        mask[1, :100] = False
    with torch.no_grad():
        expected = MPT(config()).double()
        expected.load_state_dict(model.state_dict())
        reference = expected(ids(), attention_mask=mask).logits
        found = model.cuda()(ids().cuda(), attention_mask=mask.cuda()).logits
    assert reference is not None
    assert found is not None
    difference = (found.cpu().double() - reference)[mask].abs().max()
    assert difference < 1e-3  # TensorFloat-32 is off by default; matmuls sum in another order


@pytest.mark.parametrize("padded", [False, True])
def test_bf16_gradients_of_sdpa_are_as_good_as_eagers(padded: bool) -> None:
    mask = torch.ones(2, 512, dtype=torch.bool, device="cuda")
    if padded:
        mask[1, :100] = False
    gradients = {}
    for name, dtype in (("reference", None), ("eager", torch.bfloat16), ("sdpa", torch.bfloat16)):
        torch.manual_seed(0)
        kind = "eager" if name == "reference" else name
        model = MPT(config(attn_config={"attn_impl": kind})).cuda()
        with torch.autocast("cuda", dtype=dtype or torch.float32, enabled=dtype is not None):
            loss = model(ids().cuda(), labels=ids().cuda(), attention_mask=mask).loss
        assert loss is not None
        loss.backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    scale = gradients["reference"].norm()
    errors = {name: float((gradients[name] - gradients["reference"]).norm() / scale) for name in ("eager", "sdpa")}
    assert errors["sdpa"] < max(2 * errors["eager"], 2e-2), errors


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_packed_examples_are_each_alone(kernel: str) -> None:
    """In bfloat16, with padding behind them: hidden states do not depend on the neighbours' tokens."""
    torch.manual_seed(0)
    model = MPT(config(attn_config={"attn_impl": kernel, "attn_uses_sequence_id": True})).cuda().eval()
    lengths = [200, 150, 100]
    documents = torch.full((1, 512), -1)
    start = 0
    for number, length in enumerate(lengths):
        documents[0, start : start + length] = number
        start += length
    packed = ids(1)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        together = model(packed.cuda(), sequence_id=documents.cuda(), attention_mask=(documents >= 0).cuda()).logits
        assert together is not None
        start = 0
        for length in lengths:
            alone = model(packed[:, start : start + length].cuda()).logits
            assert alone is not None
            worst = (together[:, start : start + length] - alone).float().abs().max()
            assert worst < 0.03 * alone.float().abs().max(), worst
            start += length


def test_chunked_loss_is_the_plain_one_and_leaner() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8192, 512, device="cuda", requires_grad=True)
    weight = torch.randn(50432, 512, device="cuda", requires_grad=True)
    targets = torch.randint(0, 50432, (8192,), device="cuda")
    peaks, results = [], []
    for chunked in (False, True):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if chunked:
            loss = chunked_cross_entropy(hidden, weight, targets).loss_sum
        else:
            loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append((loss.detach(), hidden.grad.clone(), weight.grad.clone()))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert peaks[1] < 0.5 * peaks[0], peaks


@pytest.mark.parametrize("init_device", ["mixed", "meta"])
def test_bf16_training_run_resumes_and_exports(init_device: str, tmp_path: Path) -> None:
    from llmtrain.checkpoint.export import export
    from llmtrain.testing.corpus import tiny_corpus
    from llmtrain.testing.launch import launch
    from llmtrain.testing.recipe import tiny_recipe

    corpus = tiny_corpus(tmp_path / "corpus")
    model = {"name": "mpt_causal_lm", "init_device": init_device, "d_model": 64, "n_heads": 4, "n_layers": 2}
    model |= {"vocab_size": corpus.vocab_size, "no_bias": True, "attn_config": {"alibi": True}}
    callbacks = {"speed_monitor": {"window_size": 2}, "memory_monitor": {}, "optimizer_monitor": {}}
    fsdp = {"sharding_strategy": "FULL_SHARD", "mixed_precision": "PURE", "activation_checkpointing": True}
    recipe = tiny_recipe(
        tmp_path / "cuda.yaml", corpus, model=model, precision="amp_bf16", callbacks=callbacks, fsdp_config=fsdp
    )
    whole = launch(recipe, ["run_name=whole"], cwd=tmp_path)
    assert whole.code == 0, whole.output
    losses = whole.metrics("loss/train/total")
    assert losses[11] < losses[0]
    first = launch(recipe, ["run_name=again", "max_duration=8ba", "scheduler.t_max=12ba"], cwd=tmp_path)
    assert first.code == 0, first.output
    again = launch(recipe, ["run_name=again"], cwd=tmp_path)
    assert again.code == 0, again.output
    assert [again.metrics("loss/train/total")[step] for step in range(12)] == pytest.approx(
        list(losses.values()), rel=1e-3
    )
    assert export(whole.folder, tmp_path / "export").tokens > 0
