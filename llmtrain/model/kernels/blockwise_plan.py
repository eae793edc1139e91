"""Which query blocks see which keys: the plan that blockwise attention works off, one row a block."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.model.kernels.interface import Visibility

BLOCK = 1024
"""Queries in a block, at most (measured, as the following; docs/log.md)."""
BLOCK_WITH_ALIBI = 256
"""With ALiBi in float32 and float64: its rounding grows with the block, and the time does not shrink."""
BLOCK_OF_LONG = 512
"""The same from `LONG` keys on, where fewer and larger pieces are a few percent faster."""
LONG = 4096
NARROWEST = 128
"""Queries in a block of a sliding window, at least."""
SHORT = 32
"""Documents shorter than this share a block with their neighbours."""
GROUP = 64
"""Tokens of short documents in one block, about."""
FEW = 16
"""So few queries are one block for the whole batch, whatever their masks are."""


class Block(NamedTuple):
    """Queries first_query..end_query (positions among the keys, end excluded) of one batch row, or of all (-1).

    They see keys visible..end_query at most: of these, `whole_from`..`whole_to` are seen by every query, and the rest
    before them by some. Those from `whole_to` are seen causally (`causal`), or need a mask.
    """

    row: int
    first_query: int
    end_query: int
    visible: int
    whole_from: int
    whole_to: int
    causal: int
    segment: int
    """Where the keys begin that have anything to do with this row's: the document's start."""
    segment_end: int

    @property
    def rows(self) -> slice:
        """The batch rows it is of."""
        return slice(None) if self.row < 0 else slice(self.row, self.row + 1)


def plan(seen: Visibility) -> tuple[Tensor, Tensor | None]:
    """The blocks as an int64 CPU tensor (blocks, len(Block._fields)), and the labels that masks are made of.

    Labels (batch, n_keys) are document numbers with a number of its own for each padded position, or None when
    causality and the window say it all.
    """
    first = seen.n_keys - seen.n_queries
    size = block_size(seen)
    if seen.documents is None and seen.padding is None:
        return _table(_blocks(-1, first, 0, seen.n_keys, seen.window, size)), None
    labels = _labels(seen)
    if seen.n_queries <= FEW:
        return _table([Block(-1, first, seen.n_keys, 0, 0, 0, 0, 0, seen.n_keys)]), labels
    blocks: list[Block] = []
    for row, numbers in enumerate(labels.cpu()):
        blocks += _of_documents(row, numbers, first, seen.window, size)
    return _table(blocks), labels


def block_size(seen: Visibility) -> int:
    """Queries in a block."""
    if seen.slopes is None or seen.dtype in (torch.bfloat16, torch.float16):
        return BLOCK
    return BLOCK_WITH_ALIBI if seen.n_keys <= LONG else BLOCK_OF_LONG


def _table(blocks: list[Block]) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int64)


def _labels(seen: Visibility) -> Tensor:
    if seen.padding is None:
        assert seen.documents is not None
        return seen.documents
    alone = -2 - torch.arange(seen.n_keys, device=seen.device)
    documents = seen.padding.long() if seen.documents is None else seen.documents
    return torch.where(seen.padding, documents, alone)


def _of_documents(row: int, numbers: Tensor, first: int, window: int | None, size: int) -> list[Block]:
    """Blocks of one batch row whose positions have these document numbers; queries begin at position `first`."""
    n = len(numbers)
    starts = (torch.diff(numbers, prepend=numbers[:1] - 1) != 0).nonzero().flatten().tolist()
    if len(starts) != len(torch.unique(numbers)):  # a number comes back: one document in several places
        return [Block(row, a, min(a + GROUP, n), 0, 0, 0, 0, 0, n) for a in range(first, n, GROUP)]
    blocks: list[Block] = []
    shared: tuple[int, int] | None = None  # neighbouring short documents so far

    def close() -> None:
        if shared is not None and shared[1] > first:
            start, end = shared
            blocks.append(Block(row, max(start, first), end, start, start, start, 0, start, end))

    for start, end in zip(starts, [*starts[1:], n], strict=True):
        if end - start >= SHORT:
            close()
            shared = None
            blocks += _blocks(row, max(start, first), start, end, window, size)
        elif shared is None or end - shared[0] > GROUP:
            close()
            shared = (start, end)
        else:
            shared = (shared[0], end)
    close()
    return blocks


def _blocks(row: int, first: int, start: int, end: int, window: int | None, size: int) -> list[Block]:
    """Blocks of the queries first..end of a document start..end."""
    if window is not None:
        size = min(size, max(NARROWEST, window))
    blocks = []
    for a in range(first, end, size):
        b = min(a + size, end)
        visible = start if window is None else max(start, a - window)
        whole_from = start if window is None else max(start, b - 1 - window)
        if whole_from <= a:
            blocks.append(Block(row, a, b, visible, whole_from, a, 1, start, end))
        else:  # the window is narrower than the block
            blocks.append(Block(row, a, b, visible, visible, visible, 0, start, end))
    return blocks
