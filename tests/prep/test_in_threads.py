import threading
import time

import pytest

from llmtrain.prep.in_threads import in_threads


def test_results_come_in_order_and_not_all_at_once():
    begun = []
    together = threading.Barrier(4, timeout=60)

    def slow_at_first(n):
        begun.append(n)
        if n < 4:
            together.wait()  # several are under way at a time
        time.sleep(0.01 if n == 0 else 0)
        return n * n

    results = in_threads(slow_at_first, range(1000))
    assert next(results) == 0
    time.sleep(0.05)
    assert len(begun) < 40  # memory: what nobody has asked for yet is not read
    assert list(results) == [n * n for n in range(1, 1000)]


def test_an_error_comes_where_its_item_stands():
    def fails(n):
        if n == 5:
            raise ValueError("no 5")
        return n

    results = in_threads(fails, range(100))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="no 5"):
        next(results)
