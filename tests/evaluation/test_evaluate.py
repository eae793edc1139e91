"""Evaluation is the mean over tokens, whatever the batch; and ALiBi goes on beyond the length of training."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmtrain.errors import UserError
from llmtrain.evaluation.evaluate import check_length, evaluate, n_targets
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT


class ArrayTokens:
    """Text in memory, as if it stood in rows of shards."""

    joined = True
    row_length = 16
    names = ()

    def __init__(self, *pieces: np.ndarray) -> None:
        self.texts = pieces
        self.pieces = [len(piece) for piece in pieces]
        self.sources = ["memory"] * len(pieces)

    def read(self, piece: int, start: int, stop: int) -> np.ndarray:
        return self.texts[piece][start:stop]


def model(**changes) -> MPT:
    torch.manual_seed(0)
    settings = {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 32, "max_seq_len": 128, "no_bias": True}
    return MPT(MPTConfig.model_validate({**settings, "attn_config": {"alibi": True}, **changes}))


def text(n: int, seed: int = 0) -> np.ndarray:
    """Two tokens in turn, others now and then: what comes next stands two tokens back."""
    rng = np.random.default_rng(seed)
    patterns = [np.tile(rng.integers(0, 32, 2), rng.integers(8, 24)) for _ in range(n // 16 + 1)]
    return np.concatenate(patterns)[:n].astype(np.int64)


def test_losses_are_those_of_the_logits_at_any_batch_size():
    made, tokens = model().eval(), ArrayTokens(text(50), text(23, seed=1))
    results = [evaluate(made, tokens, 16, batch_tokens=n) for n in (1, 40, 10_000)]
    expected = torch.zeros(16, dtype=torch.float64)
    for piece in tokens.texts:
        for start in range(0, len(piece) - 1, 15):
            ids = torch.from_numpy(piece[start : start + 16])[None]
            with torch.no_grad():
                logits = made(ids).logits[0]
            expected[1 : ids.shape[1]] += F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").double()
    for found in results:
        assert found.targets == n_targets(tokens.pieces) == 71
        torch.testing.assert_close(found.sums, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["alibi", "learned", "rope"])
def test_padding_and_neighbours_do_not_change_the_loss_of_a_token(positions: str) -> None:
    """On the right, on the left, and in a larger batch; the losses are those of the text alone."""
    attention = {"alibi": positions == "alibi", "rope": positions == "rope", "rope_impl": "hf"}
    made = model(attn_config=attention, learned_pos_emb=positions == "learned").eval()
    ids = torch.from_numpy(text(40))[None]
    other = torch.from_numpy(text(60, seed=1))[None]

    def losses(input_ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            return made(input_ids, labels=labels, attention_mask=mask, token_losses=True).token_losses

    alone = losses(ids, ids)[0, :39]
    right, left = F.pad(ids, (0, 20), value=7), F.pad(ids, (20, 0), value=7)
    on_the_right = losses(right, F.pad(ids, (0, 20), value=-100))[0, :39]
    mask = (torch.arange(60) >= 20).long()[None]
    on_the_left = losses(left, F.pad(ids, (20, 0), value=-100).masked_fill(mask == 0, -100), mask)[0, 20:59]
    batch = losses(torch.cat([other, right, other]), torch.cat([other, F.pad(ids, (0, 20), value=-100), other]))[1, :39]
    for found in (on_the_right, on_the_left, batch):
        torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-6)


def test_the_first_tokens_only():
    found = evaluate(model().eval(), ArrayTokens(text(50), text(23, seed=1)), 16, max_tokens=40)
    assert found.targets == 39


def test_lengths_that_cannot_be():
    learned = model(attn_config={"alibi": False}, learned_pos_emb=True)
    with pytest.raises(UserError, match="128 learned positions"):
        check_length(learned, 129)
    check_length(learned, 128)
    with pytest.raises(UserError, match="at least 2"):
        check_length(learned, 1)
    with pytest.raises(UserError, match=r"has 50 tokens.*--data"):
        evaluate(model(), ArrayTokens(text(50)), 64)


def test_alibi_extrapolates():
    """Trained on 128 tokens, evaluated on 256 and 512: no worse where it has never been."""
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    batches = torch.from_numpy(text(120 * 8 * 128)).view(120, 8, 128)
    for batch in batches:
        optimizer.zero_grad()
        loss = made(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    made.eval()
    tokens = ArrayTokens(text(8_192, seed=1))
    within = evaluate(made, tokens, 128)
    assert within.loss < 2.2  # it has learned something: drawing blindly costs ln 32 = 3.47
    inside = float(within.sums[64:].sum() / within.counts[64:].sum())
    for length in (256, 512):
        beyond = evaluate(made, tokens, length)
        assert beyond.targets == within.targets
        assert float(beyond.sums[128:].sum() / beyond.counts[128:].sum()) < inside + 0.1
