"""The keys and values of tokens already seen, for generation."""

import torch
from torch import Tensor

STEP = 256
"""Tokens that a buffer grows by at least, or an eighth of what it holds: copying stays cheap, little stays unused."""
SPARE = 64
"""Tokens beyond a window that are kept, so that a few new ones can be taken back."""


class KVCache:
    """Keys and values of all layers.

    Give the same cache to successive forwards; each needs only the new tokens, and the attention mask of all. Not for
    training: values are written in place.

    Memory: n_layers * 2 * batch * kv_heads * head_dim numbers a token, for what was reserved if that is enough. Buffers
    grow layer by layer, so that never more than one layer's is held twice. With a `window` only the last tokens are
    kept, `window` and a few hundred of them however long the text.

    Attributes:
        length: positions seen, padding included.
        coming: tokens of a prompt that follow those of the next forward: some rotary positions are scaled by its
            length.

    Args:
        n_layers: of the model.
        capacity: tokens to make room for at once, when it is known how many there will be.
        window: tokens before it that a token sees; None is all.
    """

    def __init__(self, n_layers: int, capacity: int = 0, window: int | None = None) -> None:
        self.length = 0
        self.coming = 0
        self._window = window
        self._reserved = capacity
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self._capacity = 0  # of each layer's buffers, between forwards
        self._held = 0  # the last so many positions lie at the front of the buffers
        self._moving = False

    def reserve(self, n_tokens: int) -> None:
        """The cache will hold so many tokens: buffers are made with that room when they are next made."""
        self._reserved = n_tokens

    def n_keys(self, n_new: int) -> int:
        """How many keys `extend` returns for so many new ones: what may be seen of those before, and the new."""
        before = self._held if self._window is None else min(self._held, self._window)
        return before + n_new

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, new, head_dim) keys and values behind those of that layer; return the last `n_keys`.

        `length` moves only in `advance`, so that all layers of a forward write to the same place.
        """
        n_new = keys.shape[2]
        kept, capacity = self._plan(n_new)
        self._moving |= kept < self._held
        held = self._layers[layer]
        if held is None or held[0].shape[2] < capacity:
            held = (
                self._moved(None if held is None else held[0], kept, capacity, keys),
                self._moved(None if held is None else held[1], kept, capacity, values),
            )
            self._layers[layer] = held
        elif kept < self._held:
            for buffer in held:
                buffer[:, :, :kept] = buffer[:, :, self._held - kept : self._held].clone()
        end = kept + n_new
        for buffer, new in zip(held, (keys, values), strict=True):
            buffer[:, :, kept:end] = new
        seen = slice(end - self.n_keys(n_new), end)
        return held[0][:, :, seen], held[1][:, :, seen]

    def advance(self, n_new: int) -> None:
        """Count the tokens that every layer has just written."""
        kept, self._capacity = self._plan(n_new)
        self._held = kept + n_new
        self.length += n_new
        self._moving = False

    def rewind(self, length: int) -> int:
        """Forget all but the first `length` positions; all, where a window has dropped what they would need.

        Returns:
            How many positions the cache holds now.
        """
        dropped = max(0, self.length - length)
        self.length -= dropped
        self._held -= dropped
        needed = self.length if self._window is None else min(self.length, self._window)
        if self._held < needed or self._moving:  # moving: a forward was interrupted between two layers
            self.length = self._held = 0
        self._moving = False
        return self.length

    def keep_rows(self, rows: Tensor) -> None:
        """Keep (or reorder, or repeat) batch rows by index: finished sequences leave the batch."""
        for layer, held in enumerate(self._layers):
            if held is not None:
                self._layers[layer] = (held[0][rows], held[1][rows])
                del held  # one layer at a time

    @property
    def n_bytes(self) -> int:
        """Size of all buffers."""
        return sum(buffer.nbytes for held in self._layers if held is not None for buffer in held)

    def _plan(self, n_new: int) -> tuple[int, int]:
        """How many of the held positions stay when so many new ones come, and the capacity of the buffers then."""
        kept = self._held
        if self._window is not None and kept + n_new > self._capacity:
            kept = min(kept, self._window + SPARE)
        needed = kept + n_new
        if needed <= self._capacity:
            return kept, self._capacity
        room = self._reserved if self._reserved >= needed else needed + max(STEP, needed // 8)
        if self._window is not None:
            room = max(needed, min(room, self._window + SPARE + max(n_new, STEP)))
        return kept, room

    def _moved(self, held: Tensor | None, kept: int, capacity: int, like: Tensor) -> Tensor:
        """A buffer of that capacity with the last `kept` of the held positions at its front."""
        batch, heads, _, head_dim = like.shape
        buffer = torch.empty(batch, heads, capacity, head_dim, dtype=like.dtype, device=like.device)
        if held is not None:
            buffer[:, :, :kept] = held[:, :, self._held - kept : self._held]
        return buffer
