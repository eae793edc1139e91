"""The KV cache: what it holds, how it grows, what it forgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.model.cache import SPARE, STEP, KVCache

LAYERS, BATCH, HEADS, WIDTH = 2, 3, 2, 4
A_TOKEN = LAYERS * 2 * BATCH * HEADS * WIDTH * 4
"""Bytes of one token in float32."""


def numbered(start: int, count: int) -> Tensor:
    """Keys that say their position."""
    return torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(BATCH, HEADS, -1, WIDTH)


def feed(cache: KVCache, count: int) -> list[float]:
    """Write the next `count` tokens; the positions that each layer gets to see."""
    new, expected = numbered(cache.length, count), cache.n_keys(count)
    for layer in range(LAYERS):
        keys, values = cache.extend(layer, new + layer, -new - layer)
        assert keys.shape == (BATCH, HEADS, expected, WIDTH)
        assert torch.equal(keys, -values)
        seen: list[float] = (keys[1, 1, :, 2] - layer).tolist()
    cache.advance(count)
    return seen


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(-90, 400), min_size=1, max_size=12),
    window=st.none() | st.integers(1, 300),
    capacity=st.sampled_from([0, 100, 1000]),
)
def test_what_may_be_seen_is_there(steps: list[int], window: int | None, capacity: int) -> None:
    """A positive step writes tokens, a negative one takes some back."""
    cache, length = KVCache(LAYERS, capacity, window), 0
    for step in steps:
        if step <= 0:
            known = cache.rewind(max(0, length + step))
            assert known in (0, max(0, length + step))
            assert window is not None or known == max(0, length + step)
            length = known
            continue
        first = 0 if window is None else max(0, length - window)
        assert feed(cache, step) == list(range(first, length + step))
        length += step
        assert cache.length == length


@pytest.mark.parametrize("n", [1, 70_000])
def test_reserved_memory_is_all_it_takes(n: int) -> None:
    cache = KVCache(LAYERS, capacity=n)
    feed(cache, 1)
    for _ in range(1, n, 7777):
        feed(cache, min(7777, n - cache.length))
    assert cache.n_bytes == n * A_TOKEN


def test_growth_is_an_eighth_at_most() -> None:
    cache, most = KVCache(LAYERS), 0.0
    while cache.length < 20_000:
        feed(cache, 500)
        most = max(most, cache.n_bytes / (A_TOKEN * (cache.length * 9 / 8 + STEP)))
    assert 0.8 < most <= 1


def test_a_window_bounds_memory() -> None:
    cache = KVCache(LAYERS, capacity=100_000, window=50)
    for _ in range(300):
        feed(cache, 200)
    for _ in range(300):
        feed(cache, 1)
    assert cache.length == 60_300
    assert cache.n_bytes <= A_TOKEN * (50 + SPARE + STEP)


def test_a_few_tokens_of_a_window_can_be_taken_back_and_many_start_over() -> None:
    cache = KVCache(LAYERS, window=50)
    for _ in range(40):
        feed(cache, 37)
    assert cache.rewind(1480 - SPARE + 37) == 1480 - SPARE + 37
    assert feed(cache, 1)[0] == 1480 - SPARE + 37 - 50
    assert cache.rewind(700) == cache.length == 0
    assert feed(cache, 3) == [0, 1, 2]


def test_a_forward_that_was_interrupted_while_a_window_moved() -> None:
    cache = KVCache(LAYERS, window=50)
    while cache.length < 1000:
        feed(cache, 40)
    for new in range(1, 400):  # some number moves the window in the first layer
        cache.extend(0, numbered(1000, new), numbered(1000, new))
    assert cache.rewind(995) == 0


def test_rows_leave_the_batch_with_their_memory() -> None:
    cache = KVCache(LAYERS, capacity=100)
    feed(cache, 10)
    cache.keep_rows(torch.tensor([2]))
    assert cache.n_bytes == 100 * A_TOKEN // BATCH
    keys, _ = cache.extend(0, numbered(10, 1)[:1], numbered(10, 1)[:1])
    assert keys[0, 0, :, 0].tolist() == list(range(11))
