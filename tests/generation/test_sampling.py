import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.generation.sampling import Sampling


def logits_of(seed: int, rows: int = 3, vocab: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


settings_of = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
)


@settings(max_examples=60, deadline=None)
@given(sampling=settings_of, seed=st.integers(0, 1000))
def test_probabilities_are_probabilities_and_keep_the_best(sampling: Sampling, seed: int) -> None:
    logits = logits_of(seed)
    p = sampling.probabilities(logits)
    assert torch.allclose(p.sum(-1), torch.ones(3), atol=1e-5)
    assert (p >= 0).all()
    assert (p.gather(-1, logits.argmax(-1, keepdim=True)) > 0).all()
    if sampling.top_k:
        assert ((p > 0).sum(-1) <= sampling.top_k).all()


@settings(max_examples=60, deadline=None)
@given(top_p=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_the_nucleus_is_the_smallest_set_that_is_enough(top_p: float, seed: int) -> None:
    logits = logits_of(seed)
    full = logits.double().softmax(-1)
    kept = Sampling(top_p=top_p).probabilities(logits) > 0
    for row, mask in zip(full, kept, strict=True):
        inside = row[mask]
        assert inside.sum() >= top_p - 1e-5
        assert inside.sum() - inside.min() < top_p + 1e-5
        assert inside.min() >= row[~mask].max() if (~mask).any() else True


def test_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.allclose(Sampling(top_p=0.6).probabilities(logits), torch.tensor([[0.625, 0.375, 0, 0]]), atol=1e-6)
    assert torch.allclose(Sampling(top_p=0.5).probabilities(logits), torch.tensor([[1.0, 0, 0, 0]]), atol=1e-6)
    assert torch.allclose(Sampling(top_k=3).probabilities(logits)[0, 0], torch.tensor(0.5 / 0.95), atol=1e-6)
    squared = torch.tensor([[0.25, 0.09, 0.0225, 0.0025]])
    assert torch.allclose(Sampling(temperature=0.5).probabilities(logits), squared / squared.sum(), atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)])
def test_three_ways_to_be_greedy(sampling: Sampling) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        assert torch.equal(sampling.draw(logits, generators), logits.argmax(-1))


def test_equal_logits_keep_k_of_them() -> None:
    assert int((Sampling(top_k=2).probabilities(torch.zeros(1, 9)) > 0).sum()) == 2


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[Sampling().draw(logits, [generator])] += 1
    # Four standard deviations of a binomial count.
    p = logits.exp()[0]
    assert ((counts / 4000 - p).abs() < 4 * (p * (1 - p) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_nonsense_is_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
