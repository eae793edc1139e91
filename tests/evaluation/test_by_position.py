import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.batch import IGNORE
from llmtrain.evaluation.by_position import LossByPosition
from llmtrain.evaluation.picture import _same_targets, draw_loss_by_position


def some(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses as a model gives them (0 where a token is no target), and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (rows, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    losses = torch.rand(labels.shape, generator=generator)
    losses[:, :-1][labels[:, 1:] == IGNORE] = 0
    losses[:, -1] = 0
    return losses, labels


def test_a_loss_counts_where_its_target_stands():
    losses, labels = some(3, 7)
    found = LossByPosition()
    found.add(losses, labels)
    for t in range(1, 7):
        counted = labels[:, t] != IGNORE
        assert found.counts[t] == counted.sum()
        assert found.sums[t] == pytest.approx(float(losses[:, t - 1][counted].sum()))
    assert found.counts[0] == 0
    assert found.loss == pytest.approx(float(losses.sum() / (labels[:, 1:] != IGNORE).sum()))


def test_batches_of_other_lengths_and_ranks_add_up():
    whole, parts, other = LossByPosition(), LossByPosition(), LossByPosition()
    long, short = some(2, 9), some(3, 4, seed=1)
    for batch in (long, short):
        whole.add(*batch)
    parts.add(*short)
    other.add(*long)
    parts.merge(other.sums, other.counts)
    assert torch.equal(parts.sums, whole.sums)
    assert torch.equal(parts.counts, whole.counts)


def test_positions_in_documents():
    losses, labels = torch.tensor([[1.0, 2.0, 4.0, 8.0, 0.0]]), torch.tensor([[5, 5, IGNORE, 5, 5]])
    found = LossByPosition()
    found.add(losses * (torch.tensor([[1, 0, 1, 1, 0]])), labels, torch.tensor([[0, 1, 0, 1, 2]]))
    assert found.sums.tolist() == [0, 1 + 4, 8, 0, 0]
    assert found.counts.tolist() == [0, 2, 1, 0, 0]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 300), st.integers(1, 5), st.integers(1, 400), st.integers(1, 6))
def test_bins_hold_every_target_once(length, rows, least, per_octave):
    found = LossByPosition()
    found.add(*some(rows, length))
    for bins in (found.curve(per_octave=per_octave, least=least), found.octaves(first=8)):
        assert sum(b.targets for b in bins) == found.targets
        assert sum(b.targets * b.loss for b in bins) == pytest.approx(float(found.sums.sum()))
        assert all(b.first <= b.last < length for b in bins)
        assert all(a.last < b.first for a, b in itertools.pairwise(bins))
    assert all(b.targets >= least for b in found.curve(per_octave=per_octave, least=least)[:-1])


def test_nothing_was_evaluated():
    assert LossByPosition().curve() == LossByPosition().octaves() == []
    assert LossByPosition().loss == 0


def test_picture(tmp_path):
    found = LossByPosition()
    found.add(*some(4, 100))
    draw_loss_by_position({"100 tokens": found.curve(), "none": []}, "title", tmp_path / "a.png")
    draw_loss_by_position({"first": found.curve(), "later": found.curve()}, "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_curves_of_the_same_targets_are_compared_with_the_first() -> None:
    found = LossByPosition()
    found.add(*some(4, 100))
    curve, other = found.curve(), found.curve(per_octave=1)
    assert _same_targets([curve, curve])
    assert not _same_targets([curve, other])
    assert not _same_targets([curve])
    assert not _same_targets([curve, []])
