"""Rows of examples become a batch."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.data.batch import IGNORE, NO_SAMPLE, SAMPLE_ID

TokensAndMask = tuple[NDArray[Any], NDArray[np.bool_]]
"""An example: its ids and which of them are targets, (n,) each."""

NumberedRow = tuple[Sequence[int], Sequence[TokensAndMask]]
"""The examples of a row, with their numbers in all sources before them."""

NO_EXAMPLE = -1
"""`sequence_id` of padding."""


class FinetuningCollator:
    """Lays examples into rows of `max_seq_len`, or shorter ones where that is asked for.

    Args:
        max_seq_len: tokens in a row.
        pad_token_id: what stands where no example is.
        padding_side: of the rows.
        packed: add `sequence_id`.
        shorten: "longest" cuts a batch to its longest row, "multiple of 8" to that, rounded up; None does not.
    """

    def __init__(
        self,
        max_seq_len: int,
        pad_token_id: int,
        *,
        padding_side: Literal["left", "right"] = "right",
        packed: bool = False,
        shorten: Literal["longest", "multiple of 8"] | None = None,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.packed = packed
        self.shorten = shorten

    def __call__(self, rows: Sequence[Sequence[TokensAndMask]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: the examples of each row; none for a blank row.

        Returns:
            `input_ids`, int64 (B, T); `labels`, int64 (B, T), the ids where they are trained and -100 elsewhere, not
            shifted; `attention_mask`, bool (B, T), False at padding; with `packed` also `sequence_id`, int64 (B, T),
            the number of the example in its row, -1 at padding. Of a blank row the mask is True at one token, so that
            no row is padding alone.
        """
        used = [sum(len(ids) for ids, _ in row) for row in rows]
        width = self.width(max(used))
        ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        trained = np.zeros((len(rows), width), np.bool_)
        number = np.full((len(rows), width), NO_EXAMPLE, np.int64)
        # Slices: a scatter by index arrays takes fifteen times as long.
        for row, examples in enumerate(rows):
            position = width - used[row] if self.padding_side == "left" else 0
            for index, (tokens, targets) in enumerate(examples):
                end = position + len(tokens)
                ids[row, position:end] = tokens
                trained[row, position:end] = targets
                number[row, position:end] = index
                position = end
            if not examples:
                number[row, -1 if self.padding_side == "left" else 0] = 0
        sequence_id = torch.from_numpy(number)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(np.where(trained, ids, IGNORE)),
            "attention_mask": sequence_id != NO_EXAMPLE,
        }
        return {**batch, "sequence_id": sequence_id} if self.packed else batch

    def numbered(self, rows: Sequence[NumberedRow]) -> dict[str, Tensor]:
        """Make a batch that says which examples it has.

        Returns:
            What the call gives, and `sample_id`: the numbers of each row's examples, int64 (B, most in a row), behind
            the last one -1.
        """
        most = max(1, *(len(numbers) for numbers, _ in rows))
        ids = torch.full((len(rows), most), NO_SAMPLE)
        for row, (numbers, _) in enumerate(rows):
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return {**self([examples for _, examples in rows]), SAMPLE_ID: ids}

    def width(self, longest: int) -> int:
        """Tokens of a row, padding included, in a batch whose longest row has `longest`."""
        if self.shorten is None:
            return self.max_seq_len
        if self.shorten == "multiple of 8":
            longest = -(-longest // 8) * 8
        return min(max(longest, 1), self.max_seq_len)
