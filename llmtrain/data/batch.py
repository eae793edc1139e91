"""Rows of token ids become batches, and batches are counted."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""A label that is no target."""

SAMPLE_ID = "sample_id"
"""Key of a batch: the numbers of what each row was made of."""

NO_SAMPLE = -1
"""Stands in `sample_id` where there is none: of a blank row, or behind the last example of a packed one."""


def tokens_in_batch(batch: Mapping[str, Any]) -> dict[str, int]:
    """Count a batch's tokens.

    Returns:
        `total`: tokens that the model reads (padding, where `attention_mask` says so, is not counted);
        `loss_generating`: targets, that is labels but the first of each row (the model shifts them) that are not -100.
    """
    mask = batch.get("attention_mask")
    total = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return {"total": int(total), "loss_generating": int((batch["labels"][:, 1:] != IGNORE).sum())}


def sample_ids(batch: Mapping[str, Any]) -> list[list[int]]:
    """Which samples stand in each row of a batch; the loader's `dataset.place` tells where one comes from.

    A sample is a row of a text dataset, or an example of a fine-tuning one: its number in all the data of the loader,
    streams and files one after the other, the same on any number of ranks and in every epoch.

    Returns:
        For each row of the batch its samples, in their order: one, several where examples are packed, none of a blank
        row. Empty where the batch does not say.
    """
    ids = batch.get(SAMPLE_ID)
    if ids is None:
        return []
    return [[number for number in row if number != NO_SAMPLE] for row in ids.reshape(len(ids), -1).tolist()]


def sequence_ids(input_ids: Tensor, boundary: int, where: Literal["eos", "bos"]) -> Tensor:
    """Number of the document that each token belongs to, from 0 in each row.

    Args:
        input_ids: int64, (B, T).
        boundary: id of the token between documents.
        where: "eos" when it ends a document and belongs to it, "bos" when it begins one.

    Returns:
        int64, (B, T). Two tokens may see each other when their numbers are equal.
    """
    ends = (input_ids == boundary).long()
    number = ends.cumsum(dim=1)
    if where == "eos":
        return number - ends
    # A row that begins in the middle of a document would count it 0, one that begins with BOS would skip 0.
    return number - number[:, :1]


class TextCollator:
    """Stacks rows to a batch.

    The batch holds `input_ids` and `labels`, int64 (B, T): labels are the unshifted ids, all of them targets (EOS
    too), the model shifts; those of a blank row are -100. `sequence_id`, int64 (B, T), where a boundary token is given;
    `sample_id` and `stream_id` (the number of the row's source), int64 (B,), where the rows have one.
    """

    def __init__(self, *, eos_token_id: int | None = None, bos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack rows: `tokens`, integer arrays of one length; some with `sample_id`, `stream_id`, or `blank`."""
        input_ids = torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))
        labels = input_ids.clone()
        labels[torch.tensor([bool(row.get("blank")) for row in rows])] = IGNORE
        batch = {"input_ids": input_ids, "labels": labels}
        if self.eos_token_id is not None:
            batch["sequence_id"] = sequence_ids(input_ids, self.eos_token_id, "eos")
        elif self.bos_token_id is not None:
            batch["sequence_id"] = sequence_ids(input_ids, self.bos_token_id, "bos")
        for key in (SAMPLE_ID, "stream_id"):
            if key in rows[0]:
                batch[key] = torch.tensor([int(row[key]) for row in rows])
        return batch
