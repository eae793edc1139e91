from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.evaluation.windows import Window, at_most, windows


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(2, 20), st.none() | st.integers(0, 150))
def test_each_token_but_the_first_of_a_piece_is_predicted_once(sizes, length, limit):
    pieces = at_most(sizes, limit)
    assert sum(pieces) <= min(sum(sizes), limit if limit is not None else sum(sizes))
    assert all(mine <= whole for mine, whole in zip(pieces, sizes, strict=False))
    cut = windows(pieces, length)
    assert all(2 <= window.length <= length for window in cut)
    predicted = [(window.piece, t) for window in cut for t in range(window.start + 1, window.stop)]
    assert predicted == [(piece, t) for piece, size in enumerate(pieces) for t in range(1, size)]


def test_windows_share_one_token():
    assert windows([7], 4) == [Window(0, 0, 4), Window(0, 3, 7)]
    assert windows([8], 4)[-1] == Window(0, 6, 8)
