"""FSDP2 on one gloo rank: the whole path works on sharded parameters and computes the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llmtrain.model.config import MPTConfig
from llmtrain.model.mpt import MPT


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


WIDE: dict[str, Any] = {
    "head_dim": 16,
    "ffn_config": {"ffn_type": "mptglu"},
    "attn_config": {"attn_type": "multiquery_attention", "rope": True, "qk_gn": True, "fused_qkv": False},
    "final_logit_softcapping": 5.0,
}


def config(tied: bool, **wide: Any) -> MPTConfig:
    return MPTConfig(
        d_model=40,
        n_heads=5,
        n_layers=2,
        vocab_size=96,
        max_seq_len=32,
        tie_word_embeddings=tied,
        **{"attn_config": {"alibi": True}, **wide},
    )


def shard(model: MPT, mesh: DeviceMesh, **options: Any) -> None:
    for module in [m for m in model.modules() if model.fsdp_wrap_fn(m)]:
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def whole(t: Tensor) -> Tensor:
    assert isinstance(t, DTensor)
    return t.full_tensor()


@pytest.mark.parametrize(("tied", "wide"), [(True, {}), (False, {}), (True, WIDE)], ids=["tied", "untied", "wide"])
def test_sharded_equals_unsharded(mesh: DeviceMesh, tied: bool, wide: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = MPT(config(tied, **wide))
    sharded = MPT(config(tied, **wide))
    sharded.load_state_dict(plain.state_dict())
    shard(sharded, mesh, reshard_after_forward=True)
    ids = torch.randint(0, 96, (2, 32))
    for _ in range(2):
        out, expected = sharded(ids, labels=ids), plain(ids, labels=ids)
        torch.testing.assert_close(out.loss, expected.loss)
        out.loss.backward()
        expected.loss.backward()
        named = dict(plain.named_parameters())
        for name, p in sharded.named_parameters():
            assert p.grad is not None, name
            torch.testing.assert_close(whole(p.grad), named[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(sharded(ids).logits, plain(ids).logits)
    sharded.eval()
    with torch.no_grad():
        assert sharded(ids, labels=ids).n_correct == plain.eval()(ids, labels=ids).n_correct


@pytest.mark.parametrize("tied", [True, False])
def test_meta_init_of_shards_draws_what_the_whole_model_draws(mesh: DeviceMesh, tied: bool) -> None:
    model = MPT(config(tied), device="meta")
    shard(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.apply(model.param_init_fn)
    torch.manual_seed(5)
    expected = dict(MPT(config(tied)).named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(whole(p), expected[name]), name


def test_mixed_precision_does_not_round_the_bias(mesh: DeviceMesh) -> None:
    """FSDP2 casts every float tensor that it finds among a block's arguments; the ALiBi bias must not be found."""
    seen: list[torch.dtype] = []
    model = MPT(config(tied=True, attn_config={"alibi": True, "attn_impl": "eager"}))
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    attn = model.transformer.blocks[0].attn
    attn.register_forward_pre_hook(lambda _, args: seen.extend([args[0].dtype, args[1].prepared.dtype]))
    ids = torch.randint(0, 96, (2, 32))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert seen == [torch.bfloat16, torch.float32]
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_mixed_precision_does_not_round_the_rotation(mesh: DeviceMesh) -> None:
    seen: list[torch.dtype] = []
    model = MPT(config(tied=True, **WIDE))
    shard(model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    attn = model.transformer.blocks[0].attn
    attn.register_forward_pre_hook(lambda _, args: seen.extend([args[0].dtype, args[1].rotation.sin.dtype]))
    ids = torch.randint(0, 96, (2, 32))
    model(ids, labels=ids).loss.backward()
    assert seen == [torch.bfloat16, torch.float32]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
