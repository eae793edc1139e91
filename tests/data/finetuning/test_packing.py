"""Packing: every example once, no row overfull, the same rows however it is fed or resumed, and rows that are full."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.finetuning.packing import OnlinePacker

lengths_of_32 = st.lists(st.integers(1, 32), max_size=200)
windows = st.integers(1, 40)
many = settings(max_examples=200, deadline=None)


def pack(lengths, window, seq_len=32, cuts=()):
    packer = OnlinePacker(seq_len, window)
    rows = []
    for part in np.split(np.asarray(lengths, int), list(cuts)):
        rows += packer.add(part)
    return rows + packer.finish()


@many
@given(lengths_of_32, windows)
def test_every_example_once_and_no_row_overfull(lengths, window):
    rows = pack(lengths, window)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[example] for example in row) <= 32 for row in rows)


@many
@given(lengths_of_32, windows, st.lists(st.integers(0, 200), max_size=5))
def test_how_the_examples_are_handed_over_makes_no_difference(lengths, window, cuts):
    assert pack(lengths, window, cuts=sorted(cuts)) == pack(lengths, window)


@many
@given(lengths_of_32, lengths_of_32, windows)
def test_leftovers_go_through_the_state(before, after, window):
    packer = OnlinePacker(32, window)
    first = packer.add(before)
    state = json.loads(json.dumps(packer.state_dict()))
    rest = packer.add(after) + packer.finish()

    resumed = OnlinePacker(1, 1)
    resumed.load_state_dict(state)
    held = resumed.examples()
    assert sorted([example for row in first for example in row] + held) == list(range(len(before)))
    assert resumed.add(after) + resumed.finish() == rest
    assert resumed.examples() == []


@many
@given(lengths_of_32, windows)
def test_few_examples_wait(lengths, window):
    packer = OnlinePacker(32, window)
    packer.add(lengths)
    state = packer.state_dict()
    assert len(state["pending"]) < window
    assert len(state["waiting"]) <= window // 16


def test_numbers_of_the_caller():
    packer = OnlinePacker(10, 3)
    assert packer.add([5, 6], examples=[70, 80]) == []
    assert packer.add([4], examples=[90]) + packer.finish() == [[80, 90], [70]]


@pytest.mark.parametrize("length", [0, -1, 33])
def test_an_example_that_cannot_be_packed_is_named(length):
    with pytest.raises(ValueError, match=f"an example of {length} tokens does not go into rows of 32"):
        OnlinePacker(32, 8).add([4, length])


@pytest.mark.parametrize(
    ("seq_len", "median", "spread"), [(2048, 840, 0.8), (4096, 840, 0.8), (8192, 840, 0.8), (2048, 200, 0.85)]
)
@pytest.mark.parametrize(("window", "least"), [(64, 0.975), (256, 0.99), (1024, 0.995)])
def test_rows_are_full(seq_len, median, spread, window, least):
    """Lengths of conversations; without packing 14% to 48% of the tokens are real."""
    draw = np.random.default_rng(1).lognormal(np.log(median), spread, 4000)
    lengths = np.clip(draw.astype(int), 8, seq_len)
    rows = pack(lengths, window, seq_len)
    assert lengths.sum() / (len(rows) * seq_len) > least


def test_examples_that_fit_with_none_other_do_not_pile_up():
    packer = OnlinePacker(100, 64)
    finished = packer.add([60] * 10_000)
    assert len(finished) >= 10_000 - 64 - 4
    assert len(packer.examples()) <= 64 + 4
