"""The gradient of two ranks is the gradient of one; micro-batches change nothing."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.errors import UserError
from llmtrain.model.config import AttentionConfig, MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.ranks import GLOO_AVERAGES_GRADIENTS, run_ranks
from llmtrain.testing.recipe import tiny_recipe

CONFIG = MPTConfig(
    d_model=24,
    n_heads=3,
    n_layers=2,
    vocab_size=64,
    max_seq_len=16,
    no_bias=True,
    attn_config=AttentionConfig(alibi=True),
)


def tokens() -> Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def gradients_of_my_half() -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = MPT(CONFIG)
    for module in model.modules():
        if model.fsdp_wrap_fn(module):
            fully_shard(module)
    fully_shard(model)
    mine = tokens().chunk(dist.get_world_size())[dist.get_rank()]
    loss = model(mine, labels=mine).loss
    assert loss is not None
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.gloo_training
def test_two_sharded_ranks_have_the_gradient_of_one() -> None:
    torch.manual_seed(0)
    model = MPT(CONFIG)
    loss = model(tokens(), labels=tokens()).loss
    assert loss is not None
    loss.backward()
    for rank in run_ranks(gradients_of_my_half, 2):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def self_check() -> str:
    from llmtrain.training.gradient_check import check_gradient_average

    try:
        check_gradient_average(torch.device("cpu"))
    except UserError as error:
        return str(error)
    return "right"


def self_check_with_summed_gradients() -> str:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    def summing(*args: object, **kwargs: object) -> tuple[object, ...]:
        return None, None, dist.ReduceOp.SUM, dist.ReduceOp.SUM

    if GLOO_AVERAGES_GRADIENTS:
        _fsdp_collectives._get_gradient_divide_factors = summing  # type: ignore[assignment]
    return self_check()


@pytest.mark.gloo_training
def test_self_check_passes_where_gradients_are_averaged() -> None:
    assert run_ranks(self_check, 2) == ["right", "right"]


def test_self_check_refuses_summed_gradients() -> None:
    """What torch 2.7 does over gloo by itself."""
    for message in run_ranks(self_check_with_summed_gradients, 2):
        assert "instead of the mean 1.5" in message
        assert "torch >= 2.11" in message


@pytest.mark.slow
@pytest.mark.gloo_training
def test_micro_batch_size_does_not_change_the_losses(
    corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("micro")
    model = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 3, "n_layers": 2, "vocab_size": corpus.vocab_size}
    model |= {"init_device": "mixed", "attn_config": {"alibi": True}}
    recipe = tiny_recipe(
        folder / "micro.yaml", corpus, model=model, max_duration="4ba", eval_loader=None, save_folder=None
    )
    losses = {}
    for size in (1, 3, 4):
        run = launch(recipe, [f"run_name=micro{size}", f"device_train_microbatch_size={size}"], ranks=2, cwd=folder)
        assert run.code == 0, run.output
        losses[size] = list(run.metrics("loss/train/total").values())
    assert len(losses[4]) == 4
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)
    assert losses[3] == pytest.approx(losses[4], rel=1e-5)
