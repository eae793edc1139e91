import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.batch import TextCollator, sample_ids, sequence_ids, tokens_in_batch


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_sequence_ids_against_a_loop(rows):
    ids = torch.tensor(rows)
    for where in ("eos", "bos"):
        got = sequence_ids(ids, 0, where).tolist()
        for row, numbers in zip(rows, got, strict=True):
            number, expected = 0, []
            for position, token in enumerate(row):
                if where == "bos" and token == 0 and position > 0:
                    number += 1
                expected.append(number)
                if where == "eos" and token == 0:
                    number += 1
            assert numbers == expected


def test_eos_belongs_to_the_document_it_ends():
    assert sequence_ids(torch.tensor([[5, 0, 6, 7, 0, 8]]), 0, "eos").tolist() == [[0, 0, 1, 1, 1, 2]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
def test_collate(dtype):
    rows = [
        {"tokens": np.array([1, 0, 2], dtype), "sample_id": np.int64(7)},
        {"tokens": np.array([3, 4, 200], dtype), "sample_id": 9},
    ]
    batch = TextCollator(eos_token_id=0)(rows)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 0, 2], [3, 4, 200]]
    assert batch["sequence_id"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["sample_id"].tolist() == [7, 9]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1  # not the same memory
    assert "sequence_id" not in TextCollator()(rows)


def test_samples_of_each_row():
    assert sample_ids({"sample_id": torch.tensor([7, -1, 9])}) == [[7], [], [9]]
    assert sample_ids({"sample_id": torch.tensor([[3, 1, -1], [-1, -1, -1], [2, 5, 0]])}) == [[3, 1], [], [2, 5, 0]]
    assert sample_ids({"input_ids": torch.zeros(2, 3)}) == []


def test_tokens_in_batch():
    ids = torch.ones(2, 5, dtype=torch.long)
    labels = ids.clone()
    assert tokens_in_batch({"input_ids": ids, "labels": labels}) == {"total": 10, "loss_generating": 8}
    labels[0] = -100
    labels[1, 0] = -100  # is no target anyway
    assert tokens_in_batch({"input_ids": ids, "labels": labels}) == {"total": 10, "loss_generating": 4}
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert tokens_in_batch({"input_ids": ids, "labels": labels, "attention_mask": mask})["total"] == 8
