"""Packed documents cannot see each other: not by one bit, and each is computed as if it were alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.model.config import MPTConfig
from llmtrain.model.documents import causality_is_enough, documents_of, positions_in
from llmtrain.model.kernels.sdpa import AlibiRow
from llmtrain.model.mpt import MPT

VOCAB = 61
lengths_of_rows = st.lists(st.integers(1, 9) | st.just(150), min_size=2, max_size=4)
"""Long ones because torch's kernel works in blocks, and because sdpa takes long documents one by one."""
settled = settings(max_examples=12, deadline=None, derandomize=True)


def build(impl: str = "sdpa", *, alibi: bool = True, uses: bool = True, **options: Any) -> MPT:
    torch.manual_seed(0)
    attn = {"attn_impl": impl, "alibi": alibi, "attn_uses_sequence_id": uses}
    sizes = {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": VOCAB, "max_seq_len": 640}
    return MPT(MPTConfig(**{**sizes, "attn_config": attn, **options}))


def pack(lengths: list[int], padding: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens (1, T) of documents behind each other, then padding; and their document numbers."""
    ids = torch.randint(0, VOCAB, (1, sum(lengths) + padding), generator=torch.Generator().manual_seed(seed))
    numbers = [n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return ids, torch.tensor([numbers])


def targets(ids: Tensor, documents: Tensor, only: int | None = None) -> Tensor:
    """A document's first token is nobody's target, and neither is padding."""
    labels = ids.masked_fill((documents < 0) | (positions_in(documents) == 0), -100)
    return labels if only is None else labels.masked_fill(documents != only, -100)


def trained(model: MPT, ids: Tensor, labels: Tensor, documents: Tensor, autocast: bool) -> dict[str, Tensor]:
    """Loss, and the gradients of parameters and embedded tokens."""
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> None:
        out.retain_grad()
        embedded.append(out)

    model.zero_grad()
    hook = model.transformer.wte.register_forward_hook(keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(ids, labels=labels, sequence_id=documents, attention_mask=documents >= 0)
    hook.remove()
    out.loss.backward()
    assert embedded[0].grad is not None
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "sum": out.loss_sum.detach(), "embedded": embedded[0].grad, **grads}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "learned"])
@pytest.mark.parametrize("impl", ["eager", "sdpa", "blockwise"])
@settled
@given(lengths=lengths_of_rows, padding=st.integers(0, 5), which=st.integers(0, 3), seed=st.integers(0, 999))
def test_other_examples_change_no_bit(
    impl: str, alibi: bool, autocast: bool, lengths: list[int], padding: int, which: int, seed: int
) -> None:
    model = build(impl, alibi=alibi)
    ids, documents = pack(lengths, padding, seed)
    kept = which % len(lengths)
    others = torch.randint(0, VOCAB, ids.shape, generator=torch.Generator().manual_seed(seed + 1))
    perturbed = torch.where(documents == kept, ids, others)
    before, after = (trained(model, x, targets(x, documents, only=kept), documents, autocast) for x in (ids, perturbed))
    own = documents[0] == kept
    before["embedded"], after["embedded"] = before["embedded"][:, own], after["embedded"][:, own]
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_without_the_flag_a_neighbour_is_seen() -> None:
    """The test above can fail."""
    ids, documents = pack([5, 6], 0, seed=0)
    perturbed = torch.where(documents == 1, ids, (ids + 1) % VOCAB)
    for uses in (True, False):
        model = build(uses=uses)
        sums = [
            model(x, labels=targets(x, documents, only=1), sequence_id=documents).loss_sum for x in (ids, perturbed)
        ]
        assert torch.equal(*sums) == uses


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "learned"])
@pytest.mark.parametrize("impl", ["eager", "sdpa", "blockwise"])
@settled
@given(lengths=lengths_of_rows, padding=st.integers(0, 5), left=st.booleans(), seed=st.integers(0, 999))
def test_a_packed_row_is_its_documents_one_by_one(
    impl: str, alibi: bool, lengths: list[int], padding: int, left: bool, seed: int
) -> None:
    model = build(impl, alibi=alibi).double()
    ids, documents = pack(lengths, padding, seed)
    if left:
        ids, documents = ids.roll(padding, 1), documents.roll(padding, 1)
    whole = trained(model, ids, targets(ids, documents), documents, autocast=False)
    packed = model(ids, sequence_id=documents).logits
    model.zero_grad()
    total = 0.0
    for number in range(len(lengths)):
        own = ids[:, documents[0] == number]
        torch.testing.assert_close(packed[:, documents[0] == number], model(own).logits)
        loss = model(own, labels=own).loss_sum
        loss.backward()
        total += loss.item()
    assert whole["sum"].item() == pytest.approx(total)
    count = max(1, sum(length - 1 for length in lengths))
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.grad / count, msg=lambda m, n=name: f"{n}: {m}")


@settled
@given(st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=4, max_size=4), min_size=1, max_size=2))
def test_no_mask_exactly_where_causality_says_the_same(rows: list[list[int]]) -> None:
    enough = all(row[j] == row[i] for row in rows for i in range(4) if row[i] >= 0 for j in range(i))
    assert causality_is_enough(torch.tensor(rows)) == enough


@settled
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=9))
def test_positions_start_over(row: list[int]) -> None:
    expected: list[int] = []
    for i, number in enumerate(row):
        expected.append(expected[-1] + 1 if i and row[i - 1] == number else 0)
    assert positions_in(torch.tensor([row])).tolist() == [expected]


def test_what_the_mask_hides_belongs_to_nobody() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert documents_of(torch.tensor([[3, 3, 3]]), mask).tolist() == [[3, 3, -1]]


@pytest.mark.parametrize("alibi", [True, False], ids=["alibi", "learned"])
def test_one_document_a_row_costs_no_mask(alibi: bool) -> None:
    """Right padding included: sdpa then needs no (batch, heads, T, T) bias."""
    model, seen = build(alibi=alibi), []
    attn = model.transformer.blocks[0].attn
    attn.register_forward_pre_hook(lambda _, args: seen.append(args[1].prepared))
    ids, documents = pack([7], 3, seed=0)
    model(ids.repeat(2, 1), sequence_id=documents.repeat(2, 1), attention_mask=(documents >= 0).repeat(2, 1))
    assert isinstance(seen[0], AlibiRow) if alibi else seen == ["causal"]


def test_documents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_id"):
        build()(torch.zeros(1, 4, dtype=torch.long), sequence_id=torch.zeros(1, 3, dtype=torch.long))


def test_last_logits_are_the_last_of_all() -> None:
    model, ids = build().eval(), pack([9], 0, seed=1)[0]
    torch.testing.assert_close(model(ids, last_logits=True).logits, model(ids).logits[:, -1:])
