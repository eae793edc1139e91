"""llm-foundry's `fsdp_config`, written for FSDP1, as a plan for FSDP2. Light: imports neither torch nor composer.

FSDP2 (`fully_shard`) shards each parameter by itself (DTensor). Keys that tune FSDP1's flat parameters and its
prefetching mean nothing there; they are accepted, and each one that asks for something gets a line that says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmtrain.config.base import Config, mistake
from llmtrain.errors import UserError

ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2", "NO_SHARD"]
MixedPrecision = Literal["PURE", "DEFAULT", "FULL"]

_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")


class PrecisionByUse(Config):
    """`mixed_precision` spelled out: dtypes of gathered parameters, of the gradient reduction, of buffers."""

    param_dtype: str | None = None
    """Gathered parameters and computation; null keeps fp32."""
    reduce_dtype: str | None = None
    """Reduction of gradients over ranks; null keeps fp32."""
    buffer_dtype: str | None = None
    """FSDP2 leaves buffers alone, and MPT has none."""

    @field_validator("param_dtype", "reduce_dtype", "buffer_dtype")
    @classmethod
    def _spelling(cls, value: str | None) -> str | None:
        name = None if value is None else _DTYPES.get(value.lower().removeprefix("torch."))
        if value is not None and name is None:
            raise ValueError(f"Expected a floating-point type: {', '.join(sorted(set(_DTYPES.values())))}.")
        return name

    def as_preset(self) -> MixedPrecision | None:
        """The preset that means the same, or None."""
        low = ("bf16", "fp16")
        parameters, reduction = self.param_dtype or "fp32", self.reduce_dtype or "fp32"
        if parameters in low and reduction == parameters:
            return "PURE"
        if reduction == "fp32":
            return "DEFAULT" if parameters in low else "FULL"
        return None


_DTYPES = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "amp_bf16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "amp_fp16": "fp16",
}


class FSDPConfig(Config):
    """How parameters, gradients and optimizer state are spread over ranks. Key names are llm-foundry's."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "device_mesh": "The mesh follows from `data_parallel_replicate_degree` and `data_parallel_shard_degree`.",
        "fsdp_version": "llmtrain always uses FSDP2. Remove the key.",
        "min_params": "An old key of Composer's: blocks are the units of sharding. Remove it.",
    }

    sharding_strategy: ShardingStrategy = "FULL_SHARD"
    """`FULL_SHARD`; `SHARD_GRAD_OP` (parameters stay gathered between forward and backward); `HYBRID_SHARD`
    (sharded within a node, replicated over nodes) and `_HYBRID_SHARD_ZERO2` (both); `NO_SHARD` (DDP)."""
    reshard_after_forward: bool | None = None
    """FSDP2's own name for the difference between FULL_SHARD (true) and SHARD_GRAD_OP (false). Follows from
    `sharding_strategy` when left out."""
    mixed_precision: MixedPrecision | PrecisionByUse = "DEFAULT"
    """`DEFAULT`: parameters in `precision`'s dtype, gradients reduced in fp32; `PURE`: both in that dtype; `FULL`: both
    in fp32, only autocast acts. Or a block of `param_dtype`, `reduce_dtype`, `buffer_dtype`."""
    activation_checkpointing: bool | Literal["selective"] = False
    """Recompute activations in the backward pass instead of keeping them: of each block, or of what
    `model.activation_checkpointing_target` names. `selective` keeps what attention gives and recomputes the rest
    (projections, norms, activations): d_model more numbers a token and block, and no second attention. With any
    `sharding_strategy`, in a single process as well."""
    activation_cpu_offload: bool = False
    """Keep the activations of blocks (with `activation_checkpointing` what that still keeps) in host memory between
    forward and backward."""
    state_dict_type: Literal["full", "sharded"] = "sharded"
    """Checkpoints: a folder with one file per rank (`sharded`), or one file written by rank 0 (`full`)."""
    load_monolith_rank0_only: bool = False
    """A full checkpoint at `load_path` is read by rank 0 only, which sends each rank its part."""
    data_parallel_shard_degree: int = Field(default=-1, ge=-1)
    """Ranks that share one copy of the parameters; -1 is all that remain."""
    data_parallel_replicate_degree: int | None = Field(default=None, ge=1)
    """Copies of the sharded parameters; above 1 means hybrid sharding."""
    cpu_offload: bool = False
    """Refused: see the message."""
    verbose: bool = False
    """Composer logs how it wraps modules."""

    # FSDP1 only. Accepted, so that old recipes run; `notes` says which of them asked for something.
    activation_checkpointing_reentrant: bool = True
    """FSDP1 only: FSDP2 always checkpoints without re-entrance."""
    auto_wrap: bool = True
    """FSDP1 only: the units are the model's blocks."""
    backward_prefetch: Literal["BACKWARD_POST", "BACKWARD_PRE", "NONE"] | None = "BACKWARD_POST"
    """FSDP1 only: FSDP2 prefetches by itself."""
    backward_prefetch_limit: int = 1
    """FSDP1 only."""
    forward_prefetch: bool = False
    """FSDP1 only: FSDP2 prefetches by itself."""
    forward_prefetch_limit: int = 1
    """FSDP1 only."""
    limit_all_gathers: bool = True
    """FSDP1 only: FSDP2 frees memory without it."""
    use_orig_params: bool = True
    """FSDP1 only: FSDP2 always keeps the original parameters."""
    sync_module_states: bool = False
    """FSDP1 only: follows from `model.init_device: mixed`."""
    keep_low_precision_grads: bool = False
    """FSDP1 only."""
    ignored_modules: Any = None
    """FSDP1 only."""
    process_group: Any = None
    """FSDP1 only: see `data_parallel_replicate_degree`."""
    load_planner: Any = None
    """FSDP1 only."""
    save_planner: Any = None
    """FSDP1 only."""
    sharded_ckpt_prefix_dir: str = "ep{epoch}-ba{batch}"
    """FSDP1 only: checkpoint folders are always named so."""
    te_checkpoint_wrapper: bool = False
    """TransformerEngine only, which llmtrain does not use."""
    te_shard_fp8_weight: bool = False
    """TransformerEngine only, which llmtrain does not use."""

    @field_validator("sharding_strategy", "backward_prefetch", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("cpu_offload")
    @classmethod
    def _no_offload(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "Composer's FSDP2 path keeps parameters and optimizer on the device; it cannot offload them. "
                "Remove the key; to save memory use `activation_checkpointing: true`, a smaller "
                "`device_train_microbatch_size`, or more ranks."
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "FSDPConfig":
        strategy, degree = self.sharding_strategy, self.data_parallel_replicate_degree
        if self.data_parallel_shard_degree == 0:
            raise mistake("Expected -1 (all ranks that remain) or a number of ranks.", "data_parallel_shard_degree")
        if strategy == "NO_SHARD" and (degree or 1) > 1:
            raise mistake("With `sharding_strategy: NO_SHARD` every rank holds a whole copy; remove this key.",
                          "data_parallel_replicate_degree")  # fmt: skip
        implied = strategy in ("FULL_SHARD", "HYBRID_SHARD")
        spelled_out = "sharding_strategy" in self.model_fields_set and strategy != "NO_SHARD"
        if self.reshard_after_forward is not None and spelled_out and self.reshard_after_forward is not implied:
            raise mistake(
                f"`sharding_strategy: {strategy}` means `reshard_after_forward: {_yaml(implied)}`. Keep one of them.",
                "reshard_after_forward",
            )
        if isinstance(self.mixed_precision, PrecisionByUse) and self.mixed_precision.as_preset() is None:
            raise mistake(
                "This combination cannot be expressed. Use `PURE` (both low), `DEFAULT` (parameters low, reduction in "
                "fp32) or `FULL` (both fp32).",
                "mixed_precision",
            )
        return self

    @property
    def precision_preset(self) -> MixedPrecision:
        """`mixed_precision` as one of the three presets."""
        preset = self.mixed_precision
        if isinstance(preset, PrecisionByUse):
            preset = preset.as_preset() or "DEFAULT"
        return preset

    @property
    def checkpointing(self) -> Literal["none", "full", "selective"]:
        """`activation_checkpointing` in one word."""
        if isinstance(self.activation_checkpointing, str):
            return self.activation_checkpointing
        return "full" if self.activation_checkpointing else "none"

    def notes(self) -> tuple[str, ...]:
        """One line for every key that asks for something that does not exist under FSDP2."""
        fields = type(self).model_fields
        lines = [
            f"fsdp_config.{key}: {_yaml(getattr(self, key))} has no effect. {reason}"
            for key, reason in _MEANINGLESS.items()
            if getattr(self, key) != fields[key].default and (key, getattr(self, key)) not in _AS_FSDP2_DOES
        ]
        buffers = isinstance(self.mixed_precision, PrecisionByUse) and self.mixed_precision.buffer_dtype
        if buffers:
            lines.append("fsdp_config.mixed_precision.buffer_dtype has no effect. FSDP2 leaves buffers as they are.")
        return tuple(lines)


_AS_FSDP2_DOES = (("activation_checkpointing_reentrant", False), ("backward_prefetch", "BACKWARD_PRE"))
"""Not FSDP1's defaults, but what FSDP2 does anyway."""

_MEANINGLESS = {
    "auto_wrap": "The blocks of the model are the units of sharding.",
    "backward_prefetch": "FSDP2 prefetches the next block by itself.",
    "backward_prefetch_limit": "FSDP2 prefetches the next block by itself.",
    "forward_prefetch": "FSDP2 prefetches the next block by itself.",
    "forward_prefetch_limit": "FSDP2 prefetches the next block by itself.",
    "limit_all_gathers": "FSDP2 frees gathered parameters without it.",
    "use_orig_params": "FSDP2 always keeps the original parameters.",
    "sync_module_states": "It follows from `model.init_device: mixed`.",
    "keep_low_precision_grads": "FSDP2 keeps gradients in the parameters' dtype.",
    "ignored_modules": "Every module of the model is sharded.",
    "process_group": "Use `data_parallel_replicate_degree`.",
    "load_planner": "Sharded checkpoints are read as they were written.",
    "save_planner": "Sharded checkpoints are written by torch's own planner.",
    "sharded_ckpt_prefix_dir": "Checkpoint folders are named ep{epoch}-ba{batch}.",
    "te_checkpoint_wrapper": "TransformerEngine is not used.",
    "te_shard_fp8_weight": "TransformerEngine is not used.",
}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class ShardingPlan:
    """What FSDP2 is told.

    Attributes:
        strategy: `fsdp` (1-d mesh), `hsdp` (2-d mesh), `ddp` (every rank holds all), `single` (one process).
        reshard_after_forward: Free gathered parameters between forward and backward.
        replicate_degree: Copies of the sharded parameters; 1 unless `hsdp` or `ddp`.
        shard_degree: Ranks that share one copy; `replicate_degree * shard_degree` is the number of ranks.
        mixed_precision: Composer's preset.
        checkpointing: What is recomputed in the backward pass (`llmtrain.training.activation_checkpointing`).
        offload_activations: Keep activations in host memory.
        state_dict_type: How checkpoints are written.
        load_monolith_rank0_only: Rank 0 reads a full checkpoint and sends the parts.
        verbose: Log how the model was sharded.
        notes: Lines to say before the run starts.
    """

    strategy: Literal["fsdp", "hsdp", "ddp", "single"]
    reshard_after_forward: bool = True
    replicate_degree: int = 1
    shard_degree: int = 1
    mixed_precision: MixedPrecision = "DEFAULT"
    checkpointing: Literal["none", "full", "selective"] = "none"
    offload_activations: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"
    load_monolith_rank0_only: bool = False
    verbose: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 wraps the model."""
        return self.strategy in ("fsdp", "hsdp")


def translate(
    cfg: FSDPConfig | None, *, world_size: int, local_world_size: int, device_type: str = "cuda"
) -> ShardingPlan:
    """Turn `fsdp_config` into a plan for this launch.

    Args:
        cfg: None means no sharding: DDP, or nothing on a single process.
        world_size: Ranks of the launch.
        local_world_size: Ranks of this node.
        device_type: `cuda` or `cpu`.

    Raises:
        UserError: The degrees do not fit the number of ranks.
    """
    notes = cfg.notes() if cfg is not None else ()
    if cfg is not None and device_type == "cpu" and cfg.activation_cpu_offload:
        notes += ("fsdp_config.activation_cpu_offload has no effect on CPU, where activations are in host memory.",)
    if cfg is not None and device_type == "cpu" and cfg.precision_preset == "PURE":
        notes += ("fsdp_config.mixed_precision: PURE has no effect on CPU, where training is in fp32.",)
    if cfg is None or cfg.sharding_strategy == "NO_SHARD":
        return ShardingPlan(
            strategy="single" if world_size == 1 else "ddp",
            reshard_after_forward=False,
            replicate_degree=world_size,
            checkpointing=cfg.checkpointing if cfg is not None else "none",
            offload_activations=cfg is not None and cfg.activation_cpu_offload,
            notes=notes,
        )
    # A single process is sharded over itself: its checkpoints continue on any number of ranks, and the other way round.
    replicate, shard = _degrees(cfg, world_size, local_world_size) if world_size > 1 else (1, 1)
    if replicate == world_size > 1:
        raise UserError(
            f"fsdp_config: {replicate} copies on {world_size} ranks leave nothing to shard. "
            "Write `sharding_strategy: NO_SHARD` if that is meant."
        )
    if cfg.sharding_strategy in _HYBRID and replicate == 1 and world_size > 1:
        notes += (
            f"fsdp_config.sharding_strategy: {cfg.sharding_strategy} on one node shards over its {world_size} ranks, "
            "as FULL_SHARD does; replicas begin with the second node.",
        )
    reshard = cfg.reshard_after_forward
    if reshard is None:
        reshard = cfg.sharding_strategy not in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2")
    return ShardingPlan(
        strategy="hsdp" if replicate > 1 else "fsdp",
        reshard_after_forward=reshard,
        replicate_degree=replicate,
        shard_degree=shard,
        mixed_precision=cfg.precision_preset,
        checkpointing=cfg.checkpointing,
        offload_activations=cfg.activation_cpu_offload,
        state_dict_type=cfg.state_dict_type,
        load_monolith_rank0_only=cfg.load_monolith_rank0_only,
        verbose=cfg.verbose,
        notes=notes,
    )


def _degrees(cfg: FSDPConfig, world_size: int, local_world_size: int) -> tuple[int, int]:
    """Copies, and ranks for each copy."""
    replicate, shard = cfg.data_parallel_replicate_degree, cfg.data_parallel_shard_degree
    if replicate is None:
        if shard > 0:
            replicate = world_size // shard
        elif cfg.sharding_strategy in _HYBRID:
            replicate = world_size // local_world_size
        else:
            replicate = 1
    if shard == -1:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise UserError(
            f"fsdp_config: data_parallel_replicate_degree ({replicate}) times data_parallel_shard_degree ({shard}) is "
            f"{replicate * shard}, but the launch has {world_size} ranks. Set one of them and leave the other out."
        )
    if replicate > 1 and cfg.sharding_strategy in ("FULL_SHARD", "SHARD_GRAD_OP") and (
        "sharding_strategy" in cfg.model_fields_set
    ):  # fmt: skip
        hybrid = "HYBRID_SHARD" if cfg.sharding_strategy == "FULL_SHARD" else "_HYBRID_SHARD_ZERO2"
        raise UserError(
            f"fsdp_config: {replicate} copies and `sharding_strategy: {cfg.sharding_strategy}` contradict each other. "
            f"Write `sharding_strategy: {hybrid}`, or remove the degrees."
        )
    return replicate, shard
