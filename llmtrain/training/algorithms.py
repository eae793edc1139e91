"""Composer algorithms by the names that llm-foundry gives them. The configs are light."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from llmtrain.config.base import Config, mistake
from llmtrain.config.named_blocks import NamedBlocks

if TYPE_CHECKING:
    from composer import Algorithm


class GradientClippingConfig(Config):
    """Clips gradients after the backward pass, before the optimizer's step."""

    clipping_type: Literal["norm", "value", "adaptive"]
    """`norm`: the global L2 norm of all gradients; `value`: each element; `adaptive`: gradient norm over weight norm,
    row by row (unsharded models only)."""
    clipping_threshold: float = Field(gt=0, allow_inf_nan=False)
    """Largest norm, absolute value or ratio."""


class SeqLengthWarmupConfig(Config):
    """Sequences grow from `min_seq_length` to the recipe's `max_seq_len` in the first part of the run."""

    duration: float = Field(default=0.3, gt=0, le=1)
    """The part of the run, 0 to 1, in which they grow."""
    min_seq_length: int = Field(default=8, ge=2)
    """Tokens of a sequence at the start, at least 2: one to read and one to predict."""
    max_seq_length: PositiveInt | None = None
    """Tokens at the end: the recipe's `max_seq_len`, which is also what leaving it out means."""
    step_size: PositiveInt = 8
    """Tokens of a step of growth; a multiple of 8 is fastest on GPUs."""
    truncate: bool = True
    """What is left of a row: true drops it (the run reads fewer tokens), false makes sequences of it (as many as it
    takes; the last one is padded)."""
    preserve_end_of_sequence: bool = False
    """With `truncate`, the row's last token takes the last place."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.preserve_end_of_sequence and not self.truncate:
            raise mistake("Nothing is cut off with `truncate: false`. Remove it.", "preserve_end_of_sequence")
        return self


class AlgorithmsConfig(NamedBlocks):
    """Algorithms that change a training step."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "alibi": (
            "Composer's `alibi` rewrites GPT-2 and BERT and does nothing to MPT: the run would train without ALiBi. It "
            "belongs in `model.attn_config.alibi: true`; remove it here."
        ),
        "gated_linear_units": (
            "Composer's `gated_linear_units` rewrites BERT and does nothing to MPT. A gated feed-forward network is "
            "chosen in `model.ffn_config.ffn_type: mptglu`."
        ),
        "low_precision_layernorm": (
            "This rewrites the model after it was built. MPT has it as `model.norm_type: low_precision_layernorm`, "
            "its default; remove it here."
        ),
    }

    gradient_clipping: GradientClippingConfig | None = None
    """Clip gradients."""
    seq_length_warmup: SeqLengthWarmupConfig | None = None
    """Begin with short sequences."""


def build_algorithms(cfg: AlgorithmsConfig | None) -> "list[Algorithm]":
    """The Composer algorithms that are switched on (`seq_length_warmup` is in `length_warmup.py`)."""
    from composer.algorithms import GradientClipping

    algorithms: list[Algorithm] = []
    if cfg is not None and cfg.gradient_clipping is not None:
        algorithms.append(GradientClipping(**cfg.gradient_clipping.model_dump()))
    return algorithms
