import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.prep import pack
from llmtrain.prep.pack import Packer


@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(1, 17),
    st.sampled_from([1, 7, 64]),
)
def test_rows_are_the_documents_end_to_end(lengths, seq_len, gather):
    """However often rows are taken, they are the concatenation, cut; only less than a row is left."""
    before, pack._GATHER = pack._GATHER, gather
    try:
        packer = Packer(seq_len, np.dtype(np.uint16))
        everything = np.arange(sum(lengths), dtype=np.uint16)
        rows = []
        for piece in np.split(everything, np.cumsum(lengths)[:-1]) if lengths else []:
            taken = packer.add(piece)
            if taken is not None:
                rows.append(taken)
        rows.append(packer.rows())
    finally:
        pack._GATHER = before
    out = np.concatenate(rows)
    n = len(everything) // seq_len
    assert out.dtype == np.uint16
    assert out.shape == (n, seq_len)
    assert np.array_equal(out.reshape(-1), everything[: n * seq_len])
    assert packer.tail == len(everything) - n * seq_len < seq_len
