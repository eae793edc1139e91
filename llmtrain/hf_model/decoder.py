"""Generation with a model of transformers and its own cache."""

from typing import Any

import torch
from torch import Tensor

from llmtrain.hf_model.model import HFCausalLM


class TransformersDecoder:
    """A whole (not sharded) model with the cache that its architecture has in transformers.

    Attributes:
        device: where ids are wanted.
        positions: most tokens that the model can take: its `max_position_embeddings`, or None.
    """

    def __init__(self, model: HFCausalLM) -> None:
        from transformers import DynamicCache

        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.cache: Any = DynamicCache()

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Logits (batch, vocab_size) after the last of (batch, T) ids, which begin with those of the call before."""
        new = ids[:, self.cache.get_seq_length() :]
        logits: Tensor = self.model(new, attention_mask=seen, cache=self.cache, last_logits=True).logits
        return logits[:, -1]

    def reserve(self, n_tokens: int) -> None:
        """The cache of transformers grows as it will."""

    def keep_rows(self, rows: Tensor) -> None:
        """Goes on with those rows of the batch only."""
        self.cache.batch_select_indices(rows)

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` tokens: the next call may go on differently from there."""
        if (excess := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-excess)  # how many to drop: transformers 5 no longer takes how many to keep
        return min(length, int(self.cache.get_seq_length()))
