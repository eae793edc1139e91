"""The keys and values of tokens already seen, for generation."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, in buffers that double when they are full.

    Give the same cache to successive forwards; each needs only the new tokens, and the attention mask of all. `length`
    is the number of positions held, padding included. Not for training: values are written in place.
    """

    def __init__(self, n_layers: int, capacity: int = 256) -> None:
        self.length = 0
        self._capacity = capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, heads, new, head_dim) keys and values behind those of that layer; return all of them.

        `length` moves only in `advance`, so that all layers of a forward write to the same place.
        """
        end = self.length + keys.shape[2]
        held = self._layers[layer]
        if held is None or held[0].shape[2] < end:
            while self._capacity < end:
                self._capacity *= 2
            held = (self._grown(held, 0, keys), self._grown(held, 1, values))
            self._layers[layer] = held
        held[0][:, :, self.length : end] = keys
        held[1][:, :, self.length : end] = values
        return held[0][:, :, :end], held[1][:, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has just written."""
        self.length += n_tokens

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or reorder, or repeat) batch rows by index: finished sequences leave the batch."""
        self._layers = [held and (held[0][rows], held[1][rows]) for held in self._layers]

    def _grown(self, held: tuple[Tensor, Tensor] | None, which: int, like: Tensor) -> Tensor:
        batch, heads, _, head_dim = like.shape
        buffer = torch.empty(batch, heads, self._capacity, head_dim, dtype=like.dtype, device=like.device)
        if held is not None:
            buffer[:, :, : self.length] = held[which][:, :, : self.length]
        return buffer
