"""Samples of a sharded model are those of the whole one, on every rank."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmtrain.errors import UserError
from llmtrain.generation.samples import sample
from llmtrain.generation.sampling import Sampling
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.ranks import run_ranks
from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

PROMPTS = ["the quick brown", "", [{"role": "user", "content": "Where is the fox?"}]]


def build(tied: bool) -> MPT:
    torch.manual_seed(1)
    config = MPTConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=512,
        max_seq_len=64,
        tie_word_embeddings=tied,
        attn_config={"alibi": True},
        init_config={"name": "baseline_", "init_std": 0.3},
    )
    return MPT(config).eval()


def samples(model: MPT, tokenizer: str, greedy: bool) -> list[list[int]]:
    opened = load_tokenizer(TokenizerConfig(name=tokenizer, chat_template="chatml"))
    sampling = Sampling(temperature=0 if greedy else 1.2)
    return [c.tokens for c in sample(model, opened, PROMPTS, max_new_tokens=12, sampling=sampling, seed=3)]


def on_a_rank(tokenizer: str, tied: bool) -> tuple[list[list[int]], list[list[int]], bool]:
    model = build(tied)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [m for m in model.modules() if model.fsdp_wrap_fn(m)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = torch.get_rng_state()
    greedy = samples(model, tokenizer, greedy=True)
    if dist.get_rank() == 1:  # a rank that draws something else would leave the others waiting
        torch.manual_seed(99)
    drawn = samples(model, tokenizer, greedy=False)
    if dist.get_rank() == 0:
        assert torch.equal(before, torch.get_rng_state())
    model.train()
    ids = torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()  # training goes on
    return greedy, drawn, all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_write_what_one_writes(tokenizer: Path, tied: bool) -> None:
    expected = [samples(build(tied), str(tokenizer), greedy) for greedy in (True, False)]
    assert expected[0] != expected[1]
    for greedy, drawn, trained in run_ranks(on_a_rank, 2, str(tokenizer), tied):
        assert [greedy, drawn] == expected
        assert trained


def test_a_conversation_needs_a_template(tokenizer: Path) -> None:
    opened = load_tokenizer(TokenizerConfig(name=str(tokenizer)))
    with pytest.raises(UserError, match=r"no chat template.*llmtrain generate"):
        sample(build(True), opened, PROMPTS, max_new_tokens=3)
