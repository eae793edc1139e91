"""The loss is transformers' own, packed rows are their examples, padding moves nothing; for each architecture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from llmtrain.errors import UserError
from llmtrain.hf_model import documents, head
from llmtrain.hf_model.build import build
from llmtrain.hf_model.config import HFConfig
from llmtrain.hf_model.load import SHARDS_MIXED_DTYPES
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.loss import IGNORED
from tests.hf_model.conftest import ARCHITECTURES, ROWS, save_model

Folder = Callable[[str], Path]
PACKING = [(name, "eager") for name in sorted(set(ARCHITECTURES) - {"bloom"})]
PACKING += [(name, "sdpa") for name in ("llama", "qwen3", "gpt_neox", "gpt2", "mixtral")]


def opened(folder: Path, **keys: Any) -> HFCausalLM:
    return build(HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(folder), **keys)).eval()


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def batch(seed: int = 0, rows: int = 3, length: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, ROWS, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, IGNORED)
    return ids, labels


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_loss_gradients_and_counts_are_transformers_own(architecture: str, model_folder: Folder) -> None:
    ours, other = opened(model_folder(architecture)), theirs(model_folder(architecture))
    ids, labels = batch()
    expected = other(input_ids=ids, labels=labels)
    logits = expected.logits[:, :-1]
    counted = labels[:, 1:] != IGNORED
    found = ours(ids, labels, token_losses=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    each = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(found.token_losses, F.pad(each.detach(), (0, 1)), rtol=1e-4, atol=1e-5)
    assert found.n_targets == counted.sum()
    assert found.n_correct == (logits.argmax(-1) == labels[:, 1:])[counted].sum()
    torch.testing.assert_close(found.token_correct, F.pad((logits.argmax(-1) == labels[:, 1:]) & counted, (0, 1)))
    assert found.logits is None
    torch.testing.assert_close(ours(ids).logits, expected.logits, rtol=1e-5, atol=1e-5)
    found.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted = {name: p.grad for name, p in other.named_parameters()}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_loss_in_several_chunks_is_the_same(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = opened(model_folder("gemma2"))
    ids, labels = batch()
    whole = ours(ids, labels)
    monkeypatch.setattr(head, "rows_in_a_chunk", lambda *sizes: 7)
    parts = ours(ids, labels)
    torch.testing.assert_close(parts.loss, whole.loss)
    assert parts.n_correct == whole.n_correct


@pytest.mark.parametrize(("architecture", "attention"), PACKING)
def test_packed_rows_are_their_examples(architecture: str, attention: str, model_folder: Folder) -> None:
    ours = opened(model_folder(architecture), attn_implementation=attention)
    if architecture in ("mpt", "gpt2") and ours.no_documents:
        pytest.skip(
            "transformers before version 5 reads such a mask the other way round, or not; such rows are refused"
        )
    lengths = (9, 4, 5)
    ids, _ = batch(1, rows=1, length=sum(lengths) + 2)
    sequence_id = torch.tensor([[0] * 9 + [1] * 4 + [2] * 5 + [-1] * 2])
    labels = ids.masked_fill(sequence_id < 0, IGNORED)
    labels[0, [0, 9, 13]] = IGNORED
    packed = ours(ids, labels, attention_mask=sequence_id >= 0, sequence_id=sequence_id)
    alone = [ours(part, part) for part in ids[:, :18].split(lengths, dim=1)]
    torch.testing.assert_close(packed.loss_sum, sum(one.loss_sum for one in alone), rtol=1e-5, atol=1e-5)
    assert packed.n_targets == sum(one.n_targets for one in alone) == 15


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_padding_on_either_side_changes_nothing(architecture: str, model_folder: Folder) -> None:
    ours = opened(model_folder(architecture))
    ids, _ = batch(2, rows=2, length=12)
    alone = ours(ids).logits
    filler = torch.full((2, 4), 5)
    real, padded = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(filler, dtype=torch.bool)
    right = ours(torch.cat([ids, filler], 1), attention_mask=torch.cat([real, padded], 1)).logits
    left = ours(torch.cat([filler, ids], 1), attention_mask=torch.cat([padded, real], 1)).logits
    torch.testing.assert_close(right[:, :12], alone, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(left[:, 4:], alone, rtol=1e-5, atol=2e-5)


def test_an_architecture_that_cannot_keep_examples_apart_says_so(model_folder: Folder) -> None:
    ours = opened(model_folder("bloom"))
    ids, labels = batch()
    with pytest.raises(UserError, match=r"bloom .*packing: false"):
        ours(ids, labels, sequence_id=torch.zeros_like(ids))
    assert ours(ids, labels).loss > 0


def test_rows_beyond_a_sliding_window_are_refused_when_packed(model_folder: Folder) -> None:
    ours = opened(model_folder("gemma2"))
    ids, _ = batch(length=40)
    assert ours(ids).logits is not None
    with pytest.raises(UserError, match=r"sliding_window of 32"):
        ours(ids, sequence_id=torch.zeros_like(ids))


def test_logits_that_transformers_changes_in_an_unknown_way_are_found(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "logit_scale", lambda config: 1.0)
    with pytest.raises(UserError, match=r"granite.*differ from transformers"):
        opened(model_folder("granite"))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_layers_and_an_untied_head_are_the_units_of_sharding(architecture: str, model_folder: Folder) -> None:
    ours = opened(model_folder(architecture))
    units = [module for module in ours.modules() if ours.fsdp_wrap_fn(module)]
    heads = [unit for unit in units if isinstance(unit, head.Head)]
    assert len(units) - len(heads) == 2
    assert len(heads) == (0 if ours.tied or not ours.plain else 1)
    assert [m for m in ours.modules() if ours.activation_checkpointing_fn(m)] == [u for u in units if u not in heads]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_a_model_on_meta_has_the_same_names_and_real_buffers(architecture: str, model_folder: Folder) -> None:
    cfg = HFConfig(name="hf_causal_lm", pretrained_model_name_or_path=str(model_folder(architecture)))
    real, empty = build(cfg, n_tokens=ROWS + 1), build(cfg, device="meta", n_tokens=ROWS + 1)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(real.named_buffers())
    assert buffers  # the frequencies of rotary embeddings: in no state dict, so no checkpoint brings them
    for name, value in empty.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert isinstance(nn.Linear(2, 2).weight.sum().item(), float)  # torch's own classes are as they were


def test_flops_of_a_llama_are_those_of_its_matrices(model_folder: Folder) -> None:
    full = opened(model_folder("llama"))
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    matrices = 2 * layer + 32 + ROWS * 32
    assert full.flops_per_token(64) == 6 * matrices + 12 * 2 * 32 * 64
    pytest.importorskip("peft")
    adapted = opened(model_folder("llama"), peft_config={"r": 2, "target_modules": "all-linear"})
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapted.flops_per_token(64) == 4 * (matrices + trained) + 2 * trained + 12 * 2 * 32 * 64


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_masks_and_positions_of_any_packing(lengths: list[int], padding: int) -> None:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    mask, positions = documents.packed(torch.tensor([ids]), torch.float32)
    assert positions[0].tolist() == [i for n in [*lengths, padding] for i in range(n)]
    for query, mine in enumerate(ids):
        seen = [key for key in range(len(ids)) if mask[0, 0, query, key] == 0]
        assert seen == [key for key in range(query + 1) if ids[key] == mine]


def test_low_precision_keeps_the_frequencies_of_positions(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save_model(tmp_path / "llama", "llama", dtype="bfloat16")
    kept = opened(folder, peft_config={"target_modules": ["q_proj"]}, frozen_dtype="bfloat16")
    frequencies = [value for name, value in kept.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert all(value.dtype == torch.float32 for value in frequencies)
    frozen = torch.bfloat16 if TorchVersion(torch.__version__) >= SHARDS_MIXED_DTYPES else torch.float32
    assert {p.dtype for p in kept.parameters() if not p.requires_grad} == {frozen}
    assert {p.dtype for p in kept.parameters() if p.requires_grad} == {torch.float32}
