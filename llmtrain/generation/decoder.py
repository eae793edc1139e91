"""The seam between generation and a model: token ids in, logits of the next token out."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.hf_model.decoder import TransformersDecoder
from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.cache import KVCache
from llmtrain.model.mpt import MPT

CHUNK = 2048
"""Tokens of a prompt that run through the model at once: activations take the memory of so many, not of the prompt."""

Progress = Callable[[int, int], None]
"""Called with how many new tokens of a prompt have been read, and how many there are."""


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

    def reserve(self, n_tokens: int) -> None:
        """There will be about so many tokens, prompt and answer: memory can be made ready for them."""
        ...

    def keep_rows(self, rows: Tensor) -> None:
        """Goes on with those rows of the batch only."""
        ...

    def rewind(self, length: int) -> int:
        """Forgets all but the first `length` tokens: the next call may go on differently from there.

        Returns how many are still known; the next call computes the others again.
        """
        ...


class CachedDecoder:
    """An MPT, whole or sharded, with a KV cache; long prompts are read in chunks.

    Each step is a call of the model itself: FSDP gathers the tied embedding in the forward of its root module only. So
    all ranks of a sharded model take the same steps (see `samples.py`).
    """

    def __init__(self, model: MPT, *, chunk: int = CHUNK, progress: Progress | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.positions = model.config.max_seq_len if model.config.uses_learned_positions else None
        window = model.config.attn_config.sliding_window_size
        self.cache = KVCache(model.config.n_layers, window=window if window > 0 else None)
        self._chunk = chunk
        self._progress = progress

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """See Decoder."""
        known, total = self.cache.length, ids.shape[1]
        report = self._progress if total - known > self._chunk else None
        if report is not None:
            report(0, total - known)
        for start in range(known, total, self._chunk):
            end = min(start + self._chunk, total)
            self.cache.coming = total - end
            out = self.model(ids[:, start:end], attention_mask=seen[:, :end], cache=self.cache, last_logits=True)
            if report is not None:
                report(end - known, total - known)
        logits: Tensor = out.logits
        return logits[:, -1]

    def reserve(self, n_tokens: int) -> None:
        """See Decoder."""
        self.cache.reserve(n_tokens)

    def keep_rows(self, rows: Tensor) -> None:
        """See Decoder."""
        self.cache.keep_rows(rows)

    def rewind(self, length: int) -> int:
        """See Decoder."""
        return self.cache.rewind(length)


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

    def reserve(self, n_tokens: int) -> None:
        """Nothing is kept between calls."""

    def keep_rows(self, rows: Tensor) -> None:
        """Nothing is kept between calls."""

    def rewind(self, length: int) -> int:
        """Nothing is kept between calls."""
        return 0


def decoder_for(
    model: nn.Module, progress: Progress | None = None
) -> CachedDecoder | TransformersDecoder | RecomputingDecoder:
    """A new decoder; the model should be in evaluation mode. How far an MPT has read a prompt, `progress` is told."""
    if isinstance(model, MPT):
        return CachedDecoder(model, progress=progress)
    whole = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if isinstance(model, HFCausalLM) and whole and model.takes_cache:
        return TransformersDecoder(model)
    return RecomputingDecoder(model)
