"""The writing of one split: what comes in parts is what comes whole, and every document and token is counted."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.prep.documents import Document
from llmtrain.prep.mds import ShardWriter
from llmtrain.prep.pack import DocumentCutter, Packer
from llmtrain.prep.split import PartCounts, SplitWriter, join_tails, total

VOCAB = 50
U16 = np.dtype(np.uint16)


def write(folder, documents, *, seq_len, minimum=1, eos=None, bos=None, cut="stream", batch=3):
    """Documents are lists of parts, which are lists of ids."""
    encoder = SimpleNamespace(vocab_size=VOCAB, dtype=U16, eos=eos, bos=bos)
    cutter = Packer(seq_len, U16) if cut == "stream" else DocumentCutter(seq_len, U16, overlap=cut == "overlap")
    shards = ShardWriter(folder, seq_len=seq_len, dtype=U16, compression=None)
    writer = SplitWriter(shards, cutter, encoder, min_document_tokens=minimum)
    waiting = []
    for parts in documents:
        labels = ["first", *["middle"] * (len(parts) - 2), "last"] if len(parts) > 1 else ["whole"]
        for ids, label in zip(parts, labels, strict=True):
            waiting.append((Document("", 2 * len(ids), "k", "p", label), np.array(ids, U16)))
    for start in range(0, len(waiting), batch):
        some = waiting[start : start + batch]
        writer.add([document for document, _ in some], [ids for _, ids in some])
    part = writer.finish()
    files = {entry["raw_data"]["basename"]: entry["raw_data"]["hashes"] for entry in part.shards}
    return part, files


IDS = st.lists(st.integers(3, VOCAB - 1), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(IDS, min_size=1, max_size=4), max_size=8),
    seq_len=st.integers(2, 9),
    minimum=st.integers(1, 15),
    frame=st.sampled_from([(None, None), (1, None), (1, 2)]),
    cut=st.sampled_from(["stream", "overlap", "drop"]),
)
def test_parts_are_written_and_counted_as_the_whole(tmp_path_factory, documents, seq_len, minimum, frame, cut):
    settings_ = {"seq_len": seq_len, "minimum": minimum, "eos": frame[0], "bos": frame[1], "cut": cut}
    joined = [[[token for part in parts for token in part]] for parts in documents]
    one, files = write(tmp_path_factory.mktemp("parts"), documents, **settings_)
    other, expected = write(tmp_path_factory.mktemp("whole"), joined, **settings_)
    assert files == expected
    assert one.counts == other.counts
    assert one.tail.tolist() == other.tail.tolist()
    assert one.token_counts.tolist() == other.token_counts.tolist()
    kept = [parts[0] for parts in joined if len(parts[0]) >= minimum]
    around = sum(token is not None for token in frame)
    counts = one.counts
    assert counts.documents == len(kept)
    assert counts.dropped_documents == len(documents) - len(kept)
    assert counts.tokens == sum(len(ids) + around for ids in kept)
    assert counts.bytes == sum(2 * len(ids) for ids in kept)
    assert counts.samples * seq_len == one.token_counts.sum()
    in_rows = counts.samples * seq_len - counts.repeated_tokens
    assert counts.tokens == in_rows + counts.dropped_tokens + len(one.tail)


def test_bos_is_before_the_first_part_and_eos_behind_the_last(tmp_path):
    part, _ = write(tmp_path, [[[7], [8], [9]], [[5, 6]]], seq_len=100, eos=1, bos=2)
    assert part.tail.tolist() == [2, 7, 8, 9, 1, 2, 5, 6, 1]


def test_tails_are_joined_in_their_order_and_only_the_last_is_dropped(tmp_path):
    tails = [np.arange(start, start + 7, dtype=np.uint16) for start in (0, 10, 20)]
    shards = ShardWriter(tmp_path, seq_len=8, dtype=U16, compression=None)
    part = join_tails(shards, 8, VOCAB, tails)
    everything = np.concatenate(tails)
    data = (tmp_path / part.shards[0]["raw_data"]["basename"]).read_bytes()
    assert data.endswith(everything[:16].tobytes())
    assert part.counts == PartCounts(samples=2, dropped_tokens=5, shard_bytes=part.counts.shard_bytes)
    assert part.token_counts.sum() == 16


def test_no_tails_no_shard(tmp_path):
    part = join_tails(ShardWriter(tmp_path, seq_len=8, dtype=U16, compression=None), 8, VOCAB, [])
    assert part.shards == []
    assert part.counts == PartCounts()


def test_totals_are_sums_and_the_entropy_is_of_all_tokens():
    counts = total(
        [PartCounts(documents=2, tokens=9, samples=1), PartCounts(tokens=3, dropped_tokens=1)], np.array([4, 0, 4])
    )
    assert (counts.documents, counts.tokens, counts.samples, counts.dropped_tokens) == (2, 12, 1, 1)
    assert counts.unigram_entropy_nats == pytest.approx(np.log(2))
