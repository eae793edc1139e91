"""Kill points: all kinds, from a seed alone, and the run gets on."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.certify.plan import KINDS, Plan, Point


def points(seed: int, kills: int, steps: int = 24, *, ranks: int = 2, every: int = 4) -> list[Point]:
    """The points of a run that saves every so many steps."""
    plan, began, found = Plan(seed, kills, steps), 0, list[Point]()
    while (point := plan.next(began, ranks)) is not None:
        assert 0 <= point.after <= steps - 2 or point.after == began
        found.append(point)
        began = max(began, point.after // every * every)
    return found


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), kills=st.integers(0, 40), steps=st.integers(6, 60), ranks=st.integers(1, 4))
def test_as_many_points_as_asked_for_none_behind_the_end(seed: int, kills: int, steps: int, ranks: int) -> None:
    found = points(seed, kills, steps, ranks=ranks)
    assert len(found) == kills
    assert found == points(seed, kills, steps, ranks=ranks)
    assert all(point.rank is None or point.rank < ranks for point in found)


def test_every_kind_comes_and_seeds_differ() -> None:
    for seed in range(20):
        counts = Counter(point.kind for point in points(seed, 20))
        assert set(counts) == set(KINDS)
        assert counts["save"] >= 5
        assert counts["evaluation"] >= 2
    assert len({tuple(points(seed, 20)) for seed in range(20)}) == 20
    assert any(point.rank is not None for point in points(0, 20))
    assert {point.kind for point in points(3, 4)} == set(KINDS)


def test_a_run_without_evaluation_is_not_killed_in_one() -> None:
    plan = Plan(0, 30, 24, evaluates=False)
    kinds = {point.kind for _ in range(30) if (point := plan.next(0, 2)) is not None}
    assert kinds == set(KINDS) - {"evaluation"}


def test_later_kills_come_later_in_the_run() -> None:
    found = points(1, 20, 40)
    assert max(point.after for point in found[:5]) < 15
    assert max(point.after for point in found) > 28
