"""The seam between generation and a model: token ids in, logits of the next token out."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.hf_model.decoder import TransformersDecoder
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.cache import KVCache
from llmtrain.model.mpt import MPT


class Decoder(Protocol):
    """A model that generation asks for one token after another.

    Attributes:
        device: where ids are wanted.
        positions: most tokens that the model can take, or None.
    """

    device: torch.device
    positions: int | None

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """Logits (batch, vocab_size) after the last token.

        Args:
            ids: (batch, T) int64, padded on the left; begins with the ids of the call before.
            seen: (batch, T) bool, True for real tokens.
        """
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """Goes on with those rows of the batch only."""
        ...

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens: the next call may go on differently from there."""
        ...


class CachedDecoder:
    """An MPT, whole or sharded, with a KV cache.

    Each step is a call of the model itself: FSDP gathers the tied embedding in the forward of its root module only. So
    all ranks of a sharded model take the same steps (see `samples.py`).
    """

    def __init__(self, model: MPT) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.positions = model.config.max_seq_len if model.config.uses_learned_positions else None
        self.cache = KVCache(model.config.n_layers)

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """See Decoder."""
        new = ids[:, self.cache.length :]
        logits: Tensor = self.model(new, attention_mask=seen, cache=self.cache, last_logits=True).logits
        return logits[:, -1]

    def keep_rows(self, rows: Tensor) -> None:
        """See Decoder."""
        self.cache.keep_rows(rows)

    def rewind(self, length: int) -> None:
        """See Decoder."""
        self.cache.rewind(length)


class RecomputingDecoder:
    """Any model with MPT's forward, without a cache: each step computes the whole again.

    For sharded models of transformers: FSDP's mixed precision would replace their cache by a copy. Short samples bear
    it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        config: Any = getattr(model, "config", None)
        self.positions: int | None = getattr(config, "max_position_embeddings", None)

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """See Decoder."""
        logits: Tensor = self.model(ids, attention_mask=seen).logits
        return logits[:, -1]

    def keep_rows(self, rows: Tensor) -> None:
        """Nothing is kept between calls."""

    def rewind(self, length: int) -> None:
        """Nothing is kept between calls."""


def decoder_for(model: nn.Module) -> CachedDecoder | TransformersDecoder | RecomputingDecoder:
    """A new decoder; the model should be in evaluation mode."""
    if isinstance(model, MPT):
        return CachedDecoder(model)
    whole = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if isinstance(model, HFCausalLM) and whole and model.takes_cache:
        return TransformersDecoder(model)
    return RecomputingDecoder(model)
