import pytest
import torch
from torch.nn import functional as F

from llmtrain.checkpoint.growth import grow_embeddings, grown_vocab_size
from llmtrain.checkpoint.weights import InMemory, Weights
from llmtrain.errors import UserError
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT


def weights_of(tied: bool, dtype: torch.dtype = torch.float32) -> Weights:
    torch.manual_seed(0)
    config = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=100, max_seq_len=8, tie_word_embeddings=tied)
    return InMemory({name: value.to(dtype) for name, value in MPT(config).state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_nothing_else_changes(tied: bool, dtype: torch.dtype) -> None:
    old = weights_of(tied, dtype)
    new = grow_embeddings(old, 128)
    assert len(old["transformer.wte.weight"]) == 100
    for name, value in new.items():
        assert (value.dtype, value.shape) == (dtype, new.shape(name))
        if name in ("transformer.wte.weight", "lm_head.weight"):
            assert value.shape == (128, 16)
            torch.testing.assert_close(value[100:], old[name].float().mean(0).to(dtype).expand(28, -1))
        assert torch.equal(value[: len(old[name])], old[name])
    config = MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=128, max_seq_len=8, tie_word_embeddings=tied)
    MPT(config).to(dtype).load_state_dict(new)


def test_the_loss_hardly_changes() -> None:
    """A new token is no more likely than the average of the old ones: the loss grows by at most log(128 / 100)."""
    old = weights_of(tied=True)
    ids = torch.randint(0, 100, (4, 8), generator=torch.Generator().manual_seed(1))
    losses = []
    for weights in (old, grow_embeddings(old, 128)):
        config = MPTConfig(
            d_model=16, n_heads=2, n_layers=1, vocab_size=len(weights["transformer.wte.weight"]), max_seq_len=8
        )
        model = MPT(config)
        model.load_state_dict(weights)
        losses.append(F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
    assert 0 < losses[1] - losses[0] <= torch.tensor(1.28).log().item() + 1e-6


def test_what_does_not_grow_stays() -> None:
    old = weights_of(tied=True)
    assert grow_embeddings(old, 100) is old


def test_shrinking_and_odd_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.vocab_size: 64 .* Set it to 100"):
        grow_embeddings(weights_of(tied=True), 64)
    with pytest.raises(UserError, match=r"model.vocab_size: 130 .*multiple of 128\. Set it to 256"):
        grow_embeddings(weights_of(tied=True), 130)


@pytest.mark.parametrize(("rows", "tokens", "wanted"), [(100, 100, 100), (100, 101, 128), (50432, 50433, 50560)])
def test_as_many_rows_as_the_tokenizer_needs(rows: int, tokens: int, wanted: int) -> None:
    assert grown_vocab_size(rows, tokens) == wanted
