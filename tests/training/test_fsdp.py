import inspect
from dataclasses import fields

import pytest
from composer.utils import FSDP2Config
from composer.utils.parallelism import FSDPConfig as ComposerFSDP1
from pydantic import ValidationError

from llmtrain.errors import UserError
from llmtrain.training.fsdp import FSDPConfig, ShardingPlan, translate


def plan(
    config: dict | None, world_size: int = 16, local_world_size: int = 8, device_type: str = "cuda"
) -> ShardingPlan:
    cfg = None if config is None else FSDPConfig.model_validate(config)
    return translate(cfg, world_size=world_size, local_world_size=local_world_size, device_type=device_type)


def test_every_key_of_fsdp1_and_fsdp2_is_known() -> None:
    composers = {field.name for cls in (ComposerFSDP1, FSDP2Config) for field in fields(cls) if field.name[0] != "_"}
    assert composers - {"device_mesh"} == set(FSDPConfig.model_fields)


def test_defaults_are_composers_but_for_the_checkpoints() -> None:
    for field in fields(ComposerFSDP1):
        if field.name[0] != "_" and field.name != "state_dict_type":
            assert FSDPConfig.model_fields[field.name].default == field.default, field.name
    assert FSDPConfig().state_dict_type == inspect.signature(FSDP2Config).parameters["state_dict_type"].default


@pytest.mark.parametrize(
    ("config", "strategy", "reshard", "replicas", "shards"),
    [
        (None, "ddp", False, 16, 1),
        ({}, "fsdp", True, 1, 16),
        ({"sharding_strategy": "FULL_SHARD"}, "fsdp", True, 1, 16),
        ({"sharding_strategy": "full_shard"}, "fsdp", True, 1, 16),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, "fsdp", False, 1, 16),
        ({"reshard_after_forward": False}, "fsdp", False, 1, 16),
        ({"sharding_strategy": "HYBRID_SHARD"}, "hsdp", True, 2, 8),
        ({"sharding_strategy": "_HYBRID_SHARD_ZERO2"}, "hsdp", False, 2, 8),
        ({"sharding_strategy": "HYBRID_SHARD", "data_parallel_replicate_degree": 4}, "hsdp", True, 4, 4),
        ({"sharding_strategy": "HYBRID_SHARD", "data_parallel_shard_degree": 2}, "hsdp", True, 8, 2),
        ({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 8}, "hsdp", True, 2, 8),
        ({"sharding_strategy": "NO_SHARD"}, "ddp", False, 16, 1),
    ],
)
def test_strategies(config: dict | None, strategy: str, reshard: bool, replicas: int, shards: int) -> None:
    found = plan(config)
    assert (found.strategy, found.reshard_after_forward) == (strategy, reshard)
    assert (found.replicate_degree, found.shard_degree) == (replicas, shards)
    assert found.notes == ()


def test_hybrid_on_one_node_shards_and_says_so() -> None:
    found = plan({"sharding_strategy": "HYBRID_SHARD"}, world_size=8)
    assert (found.strategy, found.replicate_degree, found.shard_degree) == ("fsdp", 1, 8)
    assert "on one node shards over its 8 ranks" in found.notes[0]


def test_a_single_process_is_sharded_over_itself_so_that_its_checkpoints_continue_anywhere() -> None:
    found = translate(FSDPConfig(activation_checkpointing=True), world_size=1, local_world_size=1, device_type="cuda")
    assert (found.strategy, found.shard_degree, found.state_dict_type) == ("fsdp", 1, "sharded")
    assert found.checkpointing == "full"
    hybrid = FSDPConfig(sharding_strategy="HYBRID_SHARD", data_parallel_replicate_degree=2)
    assert translate(hybrid, world_size=1, local_world_size=1).strategy == "fsdp"


def test_activations_are_recomputed_or_offloaded_without_sharding_as_well() -> None:
    found = plan({"sharding_strategy": "NO_SHARD", "activation_checkpointing": "selective"})
    assert (found.checkpointing, found.offload_activations, found.notes) == ("selective", False, ())
    assert plan({"sharding_strategy": "NO_SHARD", "activation_cpu_offload": True}).offload_activations
    assert plan(None).checkpointing == plan({}).checkpointing == "none"
    (note,) = plan({"activation_cpu_offload": True}, device_type="cpu").notes
    assert "no effect on CPU" in note


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ("PURE", "PURE"),
        ("DEFAULT", "DEFAULT"),
        ("FULL", "FULL"),
        ({"param_dtype": "bf16", "reduce_dtype": "bf16"}, "PURE"),
        ({"param_dtype": "torch.bfloat16", "reduce_dtype": "float32"}, "DEFAULT"),
        ({"param_dtype": "amp_fp16"}, "DEFAULT"),
        ({"param_dtype": None, "reduce_dtype": "fp32"}, "FULL"),
    ],
)
def test_mixed_precision(given: object, preset: str) -> None:
    assert plan({"mixed_precision": given}).mixed_precision == preset


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sharding_strategy": "ZERO3"}, "FULL_SHARD"),
        ({"cpu_offload": True}, "activation_checkpointing: true"),
        ({"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "bf16"}}, "cannot be expressed"),
        ({"mixed_precision": {"param_dtype": "int8"}}, "floating-point type"),
        ({"sharding_strategy": "SHARD_GRAD_OP", "reshard_after_forward": True}, "Keep one of them"),
        ({"sharding_strategy": "NO_SHARD", "data_parallel_replicate_degree": 2}, "whole copy"),
        ({"data_parallel_shard_degree": 0}, "-1"),
        ({"device_mesh": [2, 4]}, "device_mesh"),
    ],
)
def test_what_cannot_be_done_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FSDPConfig.model_validate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_parallel_replicate_degree": 3}, "but the launch has 16 ranks"),
        ({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4}, "is 8, but the launch has 16"),
        ({"data_parallel_replicate_degree": 16}, "leave nothing to shard"),
        ({"sharding_strategy": "FULL_SHARD", "data_parallel_replicate_degree": 2}, "HYBRID_SHARD"),
    ],
)
def test_degrees_that_do_not_fit_the_launch(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(config)


MEANINGLESS = {
    "auto_wrap": False,
    "backward_prefetch": "NONE",
    "backward_prefetch_limit": 2,
    "forward_prefetch": True,
    "forward_prefetch_limit": 2,
    "limit_all_gathers": False,
    "use_orig_params": False,
    "sync_module_states": True,
    "keep_low_precision_grads": True,
    "ignored_modules": ["a"],
    "process_group": "node",
    "load_planner": {"x": {}},
    "save_planner": {"x": {}},
    "sharded_ckpt_prefix_dir": "ep{epoch}",
    "te_checkpoint_wrapper": True,
    "te_shard_fp8_weight": True,
}


def test_each_key_without_effect_gets_one_line() -> None:
    notes = plan(MEANINGLESS).notes
    assert len(notes) == len(MEANINGLESS)
    for key in MEANINGLESS:
        assert sum(note.startswith(f"fsdp_config.{key}: ") for note in notes) == 1


def test_every_key_either_acts_or_gets_a_line() -> None:
    acting = {
        "sharding_strategy", "reshard_after_forward", "mixed_precision", "activation_checkpointing",
        "activation_cpu_offload", "state_dict_type", "load_monolith_rank0_only", "data_parallel_shard_degree",
        "data_parallel_replicate_degree", "cpu_offload", "verbose",
        "activation_checkpointing_reentrant",  # which way it is done does not change the result
    }  # fmt: skip
    assert acting | set(MEANINGLESS) == set(FSDPConfig.model_fields)


def test_the_usual_llm_foundry_block_is_quiet() -> None:
    block = {
        "sharding_strategy": "FULL_SHARD",
        "mixed_precision": "PURE",
        "activation_checkpointing": False,
        "activation_checkpointing_reentrant": False,
        "backward_prefetch": "BACKWARD_PRE",
        "activation_cpu_offload": False,
        "limit_all_gathers": True,
    }
    found = plan(block)
    assert found == ShardingPlan("fsdp", True, 1, 16, "PURE", state_dict_type="sharded")
    assert "fp32" in plan(block, device_type="cpu").notes[0]
