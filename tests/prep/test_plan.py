import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from llmtrain.errors import UserError
from llmtrain.prep import report
from llmtrain.prep.config import PrepRecipe
from llmtrain.prep.job import job_of, unfinished_plan
from llmtrain.prep.local_work import LocalWork
from llmtrain.prep.partition import make_partition
from llmtrain.prep.plan import InputFile, Partition, Piece, Plan
from llmtrain.prep.planning import bytes_to_read, grouped, partition_bytes
from llmtrain.prep.readers import BadInput
from llmtrain.prep.run import Options

MIB = 1 << 20

FILES = st.builds(InputFile, st.text(), st.text(), st.integers(0), st.integers(0))
PIECES = st.builds(
    Piece,
    st.lists(FILES, max_size=2).map(tuple),
    st.sampled_from(["all", "bytes", "rows", "row_groups"]),
    st.integers(0),
    st.none() | st.integers(0),
    size=st.integers(0, 1000),
)


def plan_of(partitions):
    facts = {"vocab_size": 300, "eos_token_id": 0}
    return Plan({"max_seq_len": 8}, {"sources": {}}, "gpt2", facts, "tiktoken", tuple(partitions), replaces=True)


@given(st.lists(st.builds(Partition, st.integers(0, 3), st.lists(PIECES, min_size=1, max_size=3).map(tuple))))
def test_a_plan_comes_back_from_its_json(partitions):
    plan = plan_of(partitions)
    data = plan.to_json()
    assert Plan.from_json(data) == plan
    assert Plan.from_json(data).to_json() == data
    assert plan.size == sum(piece.size for partition in partitions for piece in partition.pieces)
    assert plan.to_json() == data  # asking for its size changes nothing


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format": 1}', b'{"format": 99, "partitions": []}'])
def test_another_format_is_named(tmp_path, data):
    work = LocalWork(tmp_path / "out")
    work.write("plan.json", data)
    with pytest.raises(UserError, match="another version of llmtrain"):
        unfinished_plan(work)


@given(st.lists(st.builds(Piece, st.just(()), size=st.integers(0, 200))), st.integers(1, 300))
def test_groups_hold_what_fits_in_order(pieces, size):
    groups = list(grouped(pieces, size))
    assert [piece for group in groups for piece in group] == pieces
    assert all(groups)
    sums = [sum(piece.size for piece in group) for group in groups]
    assert all(total <= size or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    # Greedy: the next group's first piece did not fit any more.
    for total, following in zip(sums, groups[1:], strict=False):
        assert total + following[0].size > size


@pytest.mark.parametrize(("n", "expected"), [(3, 3), (4096, 4096), (4097, 2049), (10_000, 3334)])
def test_shards_of_the_hub_are_partitions_of_their_own_unless_there_are_too_many(n, expected):
    groups = list(grouped([Piece((), "shard", i, n) for i in range(n)], MIB))
    assert len(groups) == expected
    assert [piece.start for group in groups for piece in group] == list(range(n))


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (0, MIB),
        (10 * MIB, MIB),
        (100 * MIB, 100 * MIB // 16),
        (10_000 * MIB, 32 * MIB),
        (1_000_000 * MIB, 1_000_000 * MIB // 4096),
    ],
)
def test_size_of_a_partition(tmp_path, total, expected):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(total)  # holes: nothing is written
    base = {"out": "x", "max_seq_len": 8, "tokenizer": {"name": "x"}, "sources": [{"name": "a", "files": [str(path)]}]}
    assert partition_bytes(PrepRecipe.model_validate(base)) == expected
    assert partition_bytes(PrepRecipe.model_validate({**base, "partition_bytes": 77})) == 77


def test_the_default_depends_on_the_inputs_alone(corpus, digest):
    """About a megabyte is one partition; the unit of work is not the number of cores."""
    content, _ = corpus.make(Options(processes=2), partition_bytes=None)
    assert content["partitions"] == 2
    corpus.make(Options(processes=1), partition_bytes=None, out=str(corpus.folder / "one"))
    assert digest(corpus.out) == digest(corpus.folder / "one")


def test_partitions_of_two_sources_do_not_mix(corpus):
    place = {"files": corpus.base["sources"][0]["files"]}
    sources = [{"name": "a", **place}, {"name": "b", **place}]
    corpus.make(Options(only_plan=True), sources=sources, split_by_source=True)
    job = job_of(corpus.recipe(sources=sources, split_by_source=True))
    plan = job.plan()
    numbers = [partition.source for partition in plan.partitions]
    assert numbers == sorted(numbers)
    assert numbers.count(0) == numbers.count(1) == 20
    assert bytes_to_read(plan, range(40)) == plan.size == 2 * sum(path.stat().st_size for path in corpus.files)


def test_a_partition_is_made_once_and_the_same_every_time(corpus, digest):
    corpus.make(Options(only_plan=True))
    job = job_of(corpus.recipe())
    done: list[int] = []
    make_partition(job, 7, done.append)
    assert sum(done) > 30_000
    first = digest(corpus.partial)
    (marker,) = (corpus.partial / ".work/done/tokens").iterdir()
    assert json.loads(marker.read_bytes())["splits"]["train"]["counts"]["samples"] > 0
    make_partition(job, 7, done.clear)  # not called: there is nothing to do
    assert done
    marker.unlink()
    make_partition(job, 7)
    assert digest(corpus.partial) == first


def test_the_split_does_not_depend_on_the_partitions(corpus):
    counts = []
    for size in (20_000, 60_000, 10_000_000):
        content, _ = corpus.make(partition_bytes=size, overwrite=True)
        counts.append({split: (c["documents"], c["tokens"], c["bytes"]) for split, c in content["splits"].items()})
        assert sum(c["dropped_tokens"] for c in content["splits"].values()) < 2 * 64
    assert counts[0] == counts[1] == counts[2]


def test_a_job_pickles_small(corpus):
    import pickle

    data = pickle.dumps(job_of(corpus.recipe()))
    assert len(data) < 5_000
    assert pickle.loads(data) == job_of(corpus.recipe())


def test_many_small_files_are_grouped_without_adding_up_again():
    """A million files must not take hours: each piece's size is looked at a few times, whatever the group's length."""
    looks = 0

    class Counted(int):
        def __radd__(self, other):
            nonlocal looks
            looks += 1
            return int(other) + int(self)

    pieces = [Piece((), size=Counted(1)) for _ in range(3000)]
    assert [len(group) for group in grouped(pieces, 1000)] == [1000, 1000, 1000]
    assert looks <= 3 * len(pieces)


def test_names_of_files_that_are_no_utf8(corpus, digest):
    """Linux allows any bytes in names."""
    bad = os.fsencode(corpus.folder) + b"/docs/\xff\xfe.jsonl"
    with open(bad, "wb") as file:  # noqa: PTH123
        file.write(corpus.files[0].read_bytes() + b"{broken\n")
    for order in ("name", "shuffled"):
        sources = [{**corpus.base["sources"][0], "order": order}]
        content, _ = corpus.make(out=str(corpus.folder / order), sources=sources, on_error="skip")
        assert sum(split["documents"] for split in content["splits"].values()) == 2000
        assert content["bad_input"]["bad"] == 1


def test_what_is_bad_in_such_a_file_is_printed():
    """Standard output takes UTF-8 only."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    bad = BadInput("skip")
    bad("/docs/\udcff.jsonl, line 1", "not JSON")
    report._print_bad_input(Console(file=out, width=100), bad)
    out.flush()
    assert b"\\udcff.jsonl, line 1: not JSON" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_an_output_among_its_own_inputs_is_named(corpus):
    """Otherwise the second run would find "changed files", and with --overwrite tokenise its own shards."""
    sources = [{"name": "docs", "files": [f"{corpus.folder}/**/*.json*"]}]
    corpus.make(sources=sources)
    with pytest.raises(UserError, match=r"source 'docs' reads .*/out/.*json, which is of the output .*`exclude` it"):
        corpus.make(sources=sources)
    sources[0]["exclude"] = [f"{corpus.out}/*"]
    corpus.make(sources=sources, overwrite=True)
    assert "nothing to do" in corpus.make(sources=sources)[1]


@pytest.mark.parametrize("name", ["prep.json", "mixture.yaml", "tokenizer"])
def test_a_source_cannot_have_the_name_of_a_file_of_the_output(corpus, name):
    sources = [{**corpus.base["sources"][0], "name": name}]
    with pytest.raises(ValidationError, match=f"{name} is another file there"):
        corpus.recipe(sources=sources, split_by_source=True)
    corpus.recipe(sources=sources)
