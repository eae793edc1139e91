"""Plain MPT: transformers' own ``MptForCausalLM``. Our names are its names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.hugging_face_config import NATIVE, to_hugging_face
from llmtrain.checkpoint.layouts.layout import LayoutName
from llmtrain.model.config import MPTConfig

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights


@dataclass(frozen=True)
class MptLayout:
    """For what ``hugging_face_config.inexpressible`` has nothing to say about."""

    name: LayoutName = "mpt"
    architecture: str = NATIVE
    reason: str | None = None
    blocks: str = "transformer.blocks"
    needs_trust_remote_code: bool = False

    def config_json(self, config: MPTConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
        """See :class:`Layout`."""
        return to_hugging_face(config, dtype, token_ids)

    def weights(self, config: MPTConfig, weights: "Weights") -> "Weights":
        """As they are."""
        return weights

    def files(self) -> dict[str, str]:
        """None."""
        return {}
