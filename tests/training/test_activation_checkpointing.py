"""Recomputing changes what is kept and nothing else: gradients are the same bit for bit, names too."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.checkpoint.read import read_weights
from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.activation_checkpointing import apply, is_attention

LAYERS = 3


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen["attention" if is_attention(func) else func.name()] += 1
        return func(*args, **(kwargs or {}))


class Step:
    """A forward and a backward of a small model: its gradients, and what it kept and computed."""

    def __init__(self, checkpointing: str = "none", **config: Any) -> None:
        settings = {"resid_pdrop": 0.1, "attn_config": {"alibi": True, "attn_impl": "sdpa"}, **config}
        torch.manual_seed(0)
        cfg = MPTConfig(d_model=48, n_heads=3, n_layers=LAYERS, vocab_size=96, max_seq_len=32, **settings)
        model = MPT(cfg)
        self.changed = apply(model, checkpointing)  # type: ignore[arg-type]
        self.kept = 0
        ids = torch.randint(0, 96, (2, 32))
        with Counted() as counted:
            with saved_tensors_hooks(self._count, lambda tensor: tensor):
                loss = model(ids, labels=ids).loss
            assert loss is not None
            loss.backward()
        self.computed = counted.seen
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def _count(self, tensor: Tensor) -> Tensor:
        self.kept += tensor.numel()
        return tensor

    def same_gradients_as(self, other: "Step") -> bool:
        assert self.gradients.keys() == other.gradients.keys()
        return all(torch.equal(gradient, other.gradients[name]) for name, gradient in self.gradients.items())


@pytest.fixture(scope="module")
def plain() -> Step:
    return Step()


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_gradients_are_the_same_bit_for_bit_dropout_included(plain: Step, checkpointing: str) -> None:
    step = Step(checkpointing)
    assert step.changed == LAYERS
    assert step.same_gradients_as(plain)
    assert step.kept < 0.1 * plain.kept
    assert step.computed["aten::gelu"] == 2 * plain.computed["aten::gelu"] == 2 * LAYERS


def test_selective_computes_attention_once() -> None:
    computed = {name: Step(name).computed["attention"] for name in ("full", "selective")}
    plain = Step()  # anew: the very first step of a process also tries the kernel out
    assert plain.computed["attention"] == LAYERS
    assert computed == {"full": 2 * LAYERS, "selective": LAYERS}


@pytest.mark.parametrize("attn_impl", ["eager", "sdpa"])
def test_selective_with_dropout_in_attention_draws_the_same_numbers(attn_impl: str) -> None:
    settings: dict[str, Any] = {"attn_config": {"alibi": True, "attn_impl": attn_impl, "attn_pdrop": 0.2}}
    assert Step("selective", **settings).same_gradients_as(Step(**settings))


@pytest.mark.parametrize(
    ("target", "changed"),
    [
        ("mptblock", 3),
        ({"mptblock": 1, "grouped_query_attention": "last-2"}, 3),
        (["multihead_attention", "mptmlp"], 6),
        ({"layernorm": [0], "mptmlp": "range-1-3"}, 4),
        (["layernorm", "mptmlp", "multihead_attention"], 12),
    ],
)
def test_parts_of_blocks(plain: Step, target: Any, changed: int) -> None:
    step = Step("full", activation_checkpointing_target=target)
    assert step.changed == changed
    assert step.same_gradients_as(plain)
    assert step.kept < 0.95 * plain.kept


def test_nothing_is_kept_or_changed_in_evaluation() -> None:
    model = MPT(MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, max_seq_len=8))
    names = list(model.state_dict())
    ids = torch.arange(8)[None]
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        apply(model, "full", offload=True)
        assert torch.equal(model(ids).logits, before)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == names


def test_offload_on_a_cpu_changes_nothing() -> None:
    model = MPT(MPTConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, max_seq_len=8))
    ids = torch.arange(8)[None]
    assert apply(model, "none", offload=True) == 1
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_which_operators_are_attention() -> None:
    aten = torch.ops.aten
    assert is_attention(aten._scaled_dot_product_efficient_attention.default)
    assert is_attention(aten._scaled_dot_product_cudnn_attention.default)
    assert is_attention(torch.ops.higher_order.flex_attention)
    assert not is_attention(aten._scaled_dot_product_flash_attention_backward.default)
    assert not is_attention(torch.ops.higher_order.flex_attention_backward)
    assert not is_attention(aten.mm.default)


@pytest.mark.slow
def test_runs_are_the_same_sharded_or_not(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "plain.yaml", corpus, max_duration="3ba", eval_loader=None, save_interval="3ba")
    plain = launch(recipe, cwd=tmp_path)
    assert plain.code == 0, plain.output
    _, expected = read_weights(plain.folder / "checkpoints/ep0-ba3")
    for name, changes in {
        "unsharded": ["fsdp_config.activation_checkpointing=true", "fsdp_config.sharding_strategy=NO_SHARD"],
        "sharded": [
            "fsdp_config.activation_checkpointing=selective",
            "fsdp_config.activation_cpu_offload=true",
            "model.activation_checkpointing_target={mptblock: first-1, mptmlp: last-1}",
        ],
    }.items():
        run = launch(recipe, [f"run_name={name}", *changes], cwd=tmp_path)
        assert run.code == 0, run.output
        assert run.metrics("loss/train/total") == plain.metrics("loss/train/total"), name
        _, weights = read_weights(run.folder / "checkpoints/ep0-ba3")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
    assert "activation_cpu_offload has no effect on CPU" in run.output
