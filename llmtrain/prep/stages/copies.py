"""Which documents are copies of earlier ones, by the hashes of all of them, in bounded memory.

Positions count documents over all partitions, in the order of the plan; so what is found depends neither on how the
input is cut into partitions nor on the order in which they were signed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import UserError

Part = Callable[[], Mapping[str, NDArray[np.uint64]]]
"""Loads the hashes of a partition; called again and again."""
Positions = NDArray[np.int64]

AT_ONCE = 1 << 26
"""Hashes that are sorted at once: 4.5 GiB at most. More are taken in ranges of value, a pass over all parts each."""

_SOURCE = 0x9E3779B97F4A7C15


def offsets_of(parts: Sequence[Part], name: str) -> Positions:
    """The position of each partition's first document, and the number of all; shape (partitions + 1,)."""
    return np.concatenate([[0], np.cumsum([len(part()[name]) for part in parts], dtype=np.int64)]).astype(np.int64)


def links(
    parts: Sequence[Part],
    offsets: Positions,
    names: Sequence[str],
    sources: Sequence[int] | None,
    at_once: int | None = None,
) -> Iterator[tuple[Positions, Positions]]:
    """Copies, and the first document with the same hashes for each; 0 as the first hash is never the same.

    Args:
        parts: hashes of each partition.
        offsets: `offsets_of` them.
        names: of the arrays that make up a hash, evenly distributed values.
        sources: of each partition, to compare only within them; None compares all.
        at_once: hashes that may be in memory at once.
    """
    bits = 0
    while offsets[-1] >> bits > (at_once or AT_ONCE):
        bits += 1
    for values in range(1 << bits):
        columns: list[list[NDArray[np.uint64]]] = [[] for _ in names]
        positions = []
        for number, part in enumerate(parts):
            loaded = part()
            keys = [np.asarray(loaded[name], np.uint64) for name in names]
            taken = keys[0] != 0
            if bits:
                taken &= keys[0] >> np.uint64(64 - bits) == values
            if sources is not None:
                keys[0] = keys[0] ^ np.uint64(sources[number] * _SOURCE % 2**64)
            for column, key in zip(columns, keys, strict=True):
                column.append(key[taken])
            positions.append(np.flatnonzero(taken) + offsets[number])
        if positions:
            yield _equal([np.concatenate(column) for column in columns], np.concatenate(positions))


def _equal(keys: list[NDArray[np.uint64]], positions: Positions) -> tuple[Positions, Positions]:
    """Copies and their firsts: sorted by the first key alone, then, among those with equals, by all."""
    order = np.argsort(keys[0])
    ordered = keys[0][order]
    same = ordered[1:] == ordered[:-1]
    involved = order[np.concatenate([same, [False]]) | np.concatenate([[False], same])] if len(same) else order[:0]
    keys, positions = [key[involved] for key in keys], positions[involved]
    order = np.lexsort((positions, *reversed(keys)))
    keys, positions = [key[order] for key in keys], positions[order]
    begins = np.ones(len(positions), bool)
    if len(positions):
        begins[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    firsts = positions[np.maximum.accumulate(np.where(begins, np.arange(len(positions)), 0))]
    return positions[~begins], firsts[~begins]


def clusters(all_links: Iterator[tuple[Positions, Positions]]) -> Positions:
    """The documents that are linked to an earlier one, over any number of links; sorted.

    Memory grows with the documents that have copies, not with their links.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
    except ImportError as problem:
        raise UserError(f"stage minhash_dedup needs scipy: pip install 'llmtrain[quality]' ({problem})") from problem

    copies = firsts = np.empty(0, np.int64)
    for more_copies, more_firsts in all_links:
        ends = np.concatenate([copies, more_copies, firsts, more_firsts])
        nodes, numbered = np.unique(ends, return_inverse=True)
        a, b = np.split(numbered, 2)
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(nodes), len(nodes)))
        _, labels = connected_components(graph, directed=False)
        _, first_of_label = np.unique(labels, return_index=True)
        firsts = nodes[first_of_label][labels]
        linked = firsts != nodes
        copies, firsts = nodes[linked], firsts[linked]
    return np.asarray(copies, np.int64)
