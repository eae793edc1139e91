"""Batches: what stands where, on both sides of the padding."""

import numpy as np
import pytest

from llmtrain.data.batch import tokens_in_batch
from llmtrain.data.finetuning.collate import FinetuningCollator


def example(first, n, prompt=1):
    trained = np.ones(n, bool)
    trained[:prompt] = False
    return np.arange(first, first + n, dtype=np.uint16), trained


ROWS = [[example(10, 3), example(20, 2)], [example(30, 4, prompt=3)], []]


def test_a_packed_batch():
    batch = FinetuningCollator(8, 0, packed=True)(ROWS)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 0, 0, 0], [30, 31, 32, 33, 0, 0, 0, 0], [0] * 8]
    assert batch["labels"].tolist() == [
        [-100, 11, 12, -100, 21, -100, -100, -100],  # the first token of an example is never predicted from another
        [-100, -100, -100, 33, -100, -100, -100, -100],
        [-100] * 8,
    ]
    assert batch["sequence_id"].tolist() == [
        [0, 0, 0, 1, 1, -1, -1, -1],
        [0, 0, 0, 0, -1, -1, -1, -1],
        [0] + [-1] * 7,
    ]
    assert batch["attention_mask"].tolist() == (batch["sequence_id"] >= 0).tolist()
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "input_ids": "torch.int64",
        "labels": "torch.int64",
        "attention_mask": "torch.bool",
        "sequence_id": "torch.int64",
    }
    assert tokens_in_batch(batch) == {"total": 10, "loss_generating": 4}


def test_left_padding():
    batch = FinetuningCollator(6, 9, padding_side="left")([[example(30, 4, prompt=3)], []])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[9, 9, 30, 31, 32, 33], [9] * 6]
    assert batch["labels"].tolist() == [[-100] * 5 + [33], [-100] * 6]
    assert batch["attention_mask"].tolist() == [[False] * 2 + [True] * 4, [False] * 5 + [True]]


@pytest.mark.parametrize(
    ("shorten", "lengths", "width"),
    [
        (None, [3, 5], 20),
        ("longest", [3, 5], 5),
        ("multiple of 8", [3, 5], 8),
        ("multiple of 8", [8, 1], 8),
        ("multiple of 8", [17, 1], 20),
    ],
)
def test_widths(shorten, lengths, width):
    rows = [[example(1, length)] for length in lengths]
    assert FinetuningCollator(20, 0, shorten=shorten)(rows)["input_ids"].shape == (2, width)


def test_a_batch_of_blank_rows_has_a_width():
    assert FinetuningCollator(20, 0, shorten="longest")([[], []])["input_ids"].shape == (2, 1)
