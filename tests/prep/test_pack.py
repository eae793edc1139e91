import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.prep import pack
from llmtrain.prep.pack import DocumentCutter, Packer


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
            taken = packer.add(piece, np.array([len(piece)]))
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
    assert np.array_equal(packer.tail(), everything[n * seq_len :])
    assert packer.tail().dtype == np.uint16
    assert packer.dropped == 0


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=6),
    st.integers(1, 17),
    st.booleans(),
)
def test_a_row_is_of_one_document_and_every_token_is_accounted_for(batches, seq_len, overlap):
    """Against a plain loop over documents; the counts add up."""
    cutter = DocumentCutter(seq_len, np.dtype(np.uint16), overlap=overlap)
    token, rows, expected, short = 0, [np.empty((0, seq_len), np.uint16)], [], 0
    for lengths in batches:
        ids = np.arange(token, token + sum(lengths), dtype=np.uint32)
        taken = cutter.add(ids, np.array(lengths, np.int64))
        if taken is not None:
            rows.append(taken)
        for length in lengths:
            document = range(token, token + length)
            token += length
            short += length < seq_len
            if length >= seq_len:
                expected += [list(document[i : i + seq_len]) for i in range(0, length - seq_len + 1, seq_len)]
                if overlap and length % seq_len:
                    expected.append(list(document[-seq_len:]))
    out = np.concatenate([*rows, cutter.rows()])
    assert out.dtype == np.uint16
    assert out.tolist() == expected
    used, times = np.unique(out, return_counts=True)
    assert cutter.dropped == token - len(used)
    assert cutter.repeated == int((times - 1).sum())
    assert times.max(initial=1) <= 2
    assert cutter.short_documents == short
    if overlap:
        assert cutter.dropped == sum(length for lengths in batches for length in lengths if length < seq_len)


@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    seq_len=st.integers(1, 17),
    kind=st.sampled_from(["stream", "overlap", "drop"]),
)
def test_documents_in_parts_give_the_rows_of_whole_ones(lengths, cuts, seq_len, kind):
    """Every second document comes in parts, cut anywhere; rows, tail and counts are the same."""

    def cutter():
        if kind == "stream":
            return Packer(seq_len, np.dtype(np.uint16))
        return DocumentCutter(seq_len, np.dtype(np.uint16), overlap=kind == "overlap")

    documents = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1]) if lengths else []
    in_parts, entire = cutter(), cutter()
    rows: dict[bool, list] = {True: [], False: []}
    for number, ids in enumerate(documents):
        rows[False].append(entire.add(ids, np.array([len(ids)], np.int64)))
        if number % 2:
            rows[True].append(in_parts.add(ids, np.array([len(ids)], np.int64)))
            continue
        parts = np.split(ids, sorted(min(cut, len(ids)) for cut in cuts))
        for i, part in enumerate(parts):
            rows[True].append(in_parts.add_part(part, last=i == len(parts) - 1))
    out = {}
    for key, one in ((True, in_parts), (False, entire)):
        taken = [some for some in [*rows[key], one.rows()] if some is not None]
        counts = (one.dropped, one.repeated, one.short_documents)
        out[key] = np.concatenate(taken).tolist(), one.tail().tolist(), counts
    assert out[True] == out[False]
