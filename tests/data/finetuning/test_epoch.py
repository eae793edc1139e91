"""Which examples an epoch has: each once, or as the mixture says; the same rows for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.finetuning.config import FinetuningStreamConfig
from llmtrain.data.finetuning.epoch import EpochOrder, deal, examples_an_epoch
from llmtrain.errors import UserError


def stream(**weight):
    return FinetuningStreamConfig(files="x.jsonl", **weight)


def order(sizes=(50, 30), draws=None, window=8, shuffle=True, seq_len=64):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 40, size) for size in sizes]
    return EpochOrder(lengths, draws or sizes, seq_len=seq_len, window=window, shuffle=shuffle)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.integers(1, 45), st.integers(1, 8), st.booleans())
def test_no_example_comes_again_before_all_have_come(size, draw, epochs, shuffle):
    dealt = np.concatenate([deal(size, draw, epoch, (3, 0), shuffle) for epoch in range(epochs)])
    assert len(dealt) == draw * epochs
    counts = np.bincount(dealt, minlength=size)
    assert counts.max() - counts.min() <= 1


def test_unshuffled_examples_come_in_their_order():
    assert deal(5, 5, 3, (1, 0), False).tolist() == [0, 1, 2, 3, 4]
    assert deal(5, 3, 1, (1, 0), False).tolist() == [3, 4, 0]
    plan = order(window=None, shuffle=False).plan(0, seed=1)
    assert [plan.row(number).tolist() for number in range(len(plan))] == [[number] for number in range(80)]


@pytest.mark.parametrize("window", [None, 8, 1000])
def test_an_epoch_has_every_example_once_and_another_order_than_the_next(window):
    first, second = (order(window=window).plan(epoch, seed=1) for epoch in (0, 1))
    for plan in (first, second):
        assert sorted(plan.examples.tolist()) == list(range(80))
        assert plan.starts[-1] == 80
    assert first.examples.tolist() != second.examples.tolist()
    assert first.examples.tolist() == order(window=window).plan(0, seed=1).examples.tolist()
    assert first.examples.tolist() != order(window=window).plan(0, seed=2).examples.tolist()


def test_rows_are_no_longer_than_a_row_and_come_in_a_random_order():
    packed = order(sizes=(4000,), window=1000)
    plan = packed.plan(0, seed=1)
    used = [int(packed.lengths[plan.row(number)].sum()) for number in range(len(plan))]
    assert max(used) <= 64
    tenths = [part.mean() for part in np.array_split(np.array([len(plan.row(n)) for n in range(len(plan))]), 10)]
    assert (
        max(tenths) - min(tenths) < 1
    )  # in the order of packing the longest examples, alone in their rows, come first


def test_an_epoch_that_needs_more_rows_is_packed_closer():
    packed = order(sizes=(400,), window=2)
    wide = len(packed.plan(0, seed=1))
    close = packed.plan(0, seed=1, most_rows=wide - 1)
    assert len(close) < wide
    assert sorted(close.examples.tolist()) == list(range(400))
    assert packed.fewest_rows(seed=1) == len(close)


@pytest.mark.parametrize(
    ("weights", "epoch_size", "expected"),
    [
        ([{}, {}], None, [100, 60]),
        ([{"repeat": 2}, {"repeat": 0.5}], None, [200, 30]),
        ([{"choose": 7}, {}], None, [7, 60]),
        ([{"proportion": 3}, {"proportion": 1}], None, [120, 40]),
        ([{"proportion": 2}, {"proportion": 1}], 100, [67, 33]),
    ],
)
def test_shares(weights, epoch_size, expected):
    assert examples_an_epoch([stream(**weight) for weight in weights], [100, 60], epoch_size) == expected


def test_a_share_of_nothing_is_an_error():
    with pytest.raises(UserError, match="stream number 2 of 2 gives no example to an epoch: it has 60"):
        examples_an_epoch([stream(proportion=1000), stream(proportion=1)], [100, 60], 50)
