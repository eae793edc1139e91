import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.prep.stages import copies


def as_parts(arrays):
    return [lambda array=array: array for array in arrays]


@st.composite
def signatures(draw):
    """Partitions of documents with two hashes each, of few values spread over the whole range."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    values = np.array([1, 2, 3, 1 << 62, (1 << 63) + 1, (1 << 64) - 1, 0], np.uint64)
    pick = st.sampled_from(range(len(values)))
    return [
        {name: values[draw(st.lists(pick, min_size=n, max_size=n))].astype(np.uint64) for name in ("a", "b")}
        for n in sizes
    ]


def brute_force(keys):
    """Copy -> first, over keys that are not None."""
    first, found = {}, {}
    for position, key in enumerate(keys):
        if key is not None:
            first.setdefault(key, position)
            if first[key] != position:
                found[position] = first[key]
    return found


@settings(deadline=None)
@given(signatures(), st.sampled_from([1, 2, 5, 1000]), st.booleans())
def test_links_are_those_of_equal_hashes_whatever_fits_into_memory(arrays, at_once, by_source):
    parts, sources = as_parts(arrays), [n % 2 for n in range(len(arrays))]
    offsets = copies.offsets_of(parts, "a")
    keys = [
        None if a == 0 else (a, b, sources[n] if by_source else None)
        for n, array in enumerate(arrays)
        for a, b in zip(array["a"].tolist(), array["b"].tolist(), strict=True)
    ]
    given_sources = sources if by_source else None
    links = list(copies.links(parts, offsets, ["a", "b"], given_sources, at_once))
    found = [(copy, first) for pair in links for copy, first in zip(*map(np.ndarray.tolist, pair), strict=True)]
    assert len(found) == len(dict(found))
    assert dict(found) == brute_force(keys)
    assert len(links) >= min(offsets[-1], 64) / at_once / 2  # it did take ranges


@settings(deadline=None)  # the first imports scipy
@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12), max_size=5))
def test_of_each_cluster_the_first_stays(rounds):
    neighbours = {n: {n} for n in range(31)}
    for pairs in rounds:
        for a, b in pairs:
            joined = neighbours[a] | neighbours[b]
            for n in joined:
                neighbours[n] = joined
    as_arrays = (
        (np.array([max(pair) for pair in pairs], np.int64), np.array([min(pair) for pair in pairs], np.int64))
        for pairs in rounds
    )
    assert copies.clusters(as_arrays).tolist() == [n for n in range(31) if min(neighbours[n]) != n]
