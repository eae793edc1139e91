"""Composer algorithms by the names that llm-foundry gives them. The configs are light."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmtrain.config.base import Config
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


def build_algorithms(cfg: AlgorithmsConfig | None) -> "list[Algorithm]":
    """The Composer algorithms that are switched on."""
    from composer.algorithms import GradientClipping

    algorithms: list[Algorithm] = []
    if cfg is not None and cfg.gradient_clipping is not None:
        algorithms.append(GradientClipping(**cfg.gradient_clipping.model_dump()))
    return algorithms
