"""`streaming: true`: each example once, exact resumes with what was left over; other numbers of ranks lose nothing."""

import json
from collections import Counter

import pytest
import torch
from streaming import MDSWriter

from llmtrain.data.batch import sample_ids
from llmtrain.data.finetuning import online_loader
from llmtrain.data.finetuning.config import FinetuningDatasetConfig, FinetuningLoaderConfig
from llmtrain.data.finetuning.local_ranks import Place
from llmtrain.data.finetuning.online import StreamedExamples
from llmtrain.data.finetuning.online_loader import StreamingLoader
from llmtrain.data.finetuning.show import describe
from llmtrain.errors import UserError
from tests.data.finetuning.conftest import chat
from tests.data.finetuning.test_loader import flat, numbers


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with MDSWriter(out=str(folder), columns={"messages": "json"}, size_limit=4096) as writer:
        for number in range(120):
            writer.write(chat(number))
    assert len(list(folder.glob("*.mds"))) > 3
    return folder


@pytest.fixture
def stream(build, shards):
    def make(**settings):
        keys = {"local": str(shards), "streaming": True, "packing": True, "packing_window": 16, "shuffle": True}
        return build(**{**keys, **settings})

    return make


@pytest.mark.parametrize("keys", [{}, {"packing": False}, {"shuffle": False}, {"workers": 2}])
def test_an_epoch_has_each_example_once(stream, chat_tokenizer, keys):
    loader = stream(**keys)
    batches = list(loader)
    first, second = numbers(batches, chat_tokenizer), numbers(loader, chat_tokenizer)
    assert [[tuple(row) for row in sample_ids(batch)] for batch in batches] == first
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(120))
    assert (first != second) == keys.get("shuffle", True)
    assert all(len(batch) == 4 for batch in first)
    if keys.get("packing", True):
        assert len(first) < 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7])
def test_resume_with_what_was_left_over(stream, chat_tokenizer, stop, workers):
    whole = stream()
    first, second, third = (numbers(whole, chat_tokenizer) for _ in range(3))
    interrupted = stream(workers=workers)
    assert numbers(interrupted, chat_tokenizer) == first
    batches = iter(interrupted)
    assert numbers([next(batches) for _ in range(stop)], chat_tokenizer) == second[:stop]
    state = interrupted.dataset.state_dict(stop * 4, True)
    saved = dict(state)
    next(batches)
    assert state == saved  # going on changes no checkpoint
    (mine,) = json.loads(saved["ranks"])
    assert mine["packer"]["waiting"] or mine["packer"]["pending"] or mine["rows"]
    # A distributed checkpoint loads the keys that the new run has: they must not depend on what is left over.
    assert {key: type(value) for key, value in stream().dataset.state_dict(0, True).items()} == {
        key: type(value) for key, value in saved.items()
    }

    resumed = stream(workers=workers)
    resumed.dataset.load_state_dict(saved)
    assert numbers(resumed, chat_tokenizer) == second[stop:]
    assert numbers(resumed, chat_tokenizer) == third


def test_between_two_epochs_the_state_names_the_next(stream, chat_tokenizer):
    whole = stream()
    numbers(whole, chat_tokenizer)
    state = whole.dataset.state_dict(0, True)
    second = numbers(whole, chat_tokenizer)
    resumed = stream()
    resumed.dataset.load_state_dict(state)
    assert numbers(resumed, chat_tokenizer) == second


def test_an_epoch_cut_short_is_no_longer_after_a_resume(stream, chat_tokenizer):
    whole = stream(epoch_batches=3)
    first, second = numbers(whole, chat_tokenizer), numbers(whole, chat_tokenizer)
    assert [len(first), len(second)] == [3, 3]
    interrupted = stream(epoch_batches=3)
    batches = iter(interrupted)
    next(batches)
    resumed = stream(epoch_batches=3)
    resumed.dataset.load_state_dict(interrupted.dataset.state_dict(4, True))
    assert numbers(resumed, chat_tokenizer) == first[1:]
    assert numbers(resumed, chat_tokenizer) == second


def of_ranks(loader, ranks):
    """The loaders of several ranks, one after the other in this process."""
    data = loader.dataset
    (source,) = data.sources
    keys = {"local": source.config.local, "max_seq_len": 128, "streaming": True, "packing": True, "shuffle": True}
    cfg = FinetuningDatasetConfig.model_validate({**keys, "packing_window": data.window})
    made = []
    for rank in range(ranks):
        dataset = StreamedExamples(data.sources, data.tokenize, cfg, Place(rank, ranks, rank), vocab_size=4096)
        made.append(StreamingLoader(dataset, loader.collate, FinetuningLoaderConfig(dataset=cfg, num_workers=0), 4))
    return made


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3), (1, 4), (3, 1)])
def test_on_another_number_of_ranks_nothing_is_lost(stream, chat_tokenizer, before, after):
    loader = stream()
    seen = Counter()
    states = []
    for one in of_ranks(loader, before):
        batches = iter(one)
        seen.update(flat(numbers([next(batches) for _ in range(2)], chat_tokenizer)))
        states += json.loads(one.dataset.state_dict(8, True)["ranks"])
    assert 0 < sum(seen.values()) < 120
    for one in of_ranks(loader, after):
        one.dataset.load_state_dict({"shuffle_seed": 9176, "streaming": True, "ranks": json.dumps(states)})
        seen.update(flat(numbers(one, chat_tokenizer)))
    assert seen == Counter(range(120))


def test_ranks_that_are_done_give_blank_rows(stream, monkeypatch):
    (loader, *_) = of_ranks(stream(), 2)
    alone = len(list(loader))
    others = iter([True] * (alone + 2) + [False])

    def gather(value):
        return [value, next(others)] if isinstance(value, bool) else [value]

    monkeypatch.setattr(online_loader, "gather", gather)
    batches = list(loader)
    assert len(batches) == alone + 2
    assert (batches[-1]["labels"] == -100).all()
    assert batches[-1]["input_ids"].shape == (4, 128)


def test_repeated_examples(stream, chat_tokenizer, shards):
    loader = stream(local=None, streams={"a": {"local": str(shards), "repeat": 2}, "b": {"local": str(shards)}})
    assert Counter(flat(numbers(loader, chat_tokenizer))) == Counter(list(range(120)) * 3)


def test_an_evaluation_is_the_same_each_time(stream, chat_tokenizer):
    loader = stream(evaluation=True)
    first = numbers(loader, chat_tokenizer)
    assert numbers(loader, chat_tokenizer) == first
    assert sorted(flat(first)) == list(range(120))


def test_the_next_batch_can_be_shown_and_is_not_taken(stream, chat_tokenizer):
    loader = stream()
    shown = describe(loader, chat_tokenizer)
    assert " train | " in shown.full
    assert "tokenized while it is read" in shown.full
    _, seen = loader.next_batch()
    first = next(iter(loader))
    assert all(torch.equal(seen[key], first[key]) for key in first)


def test_its_length_is_not_known(stream):
    with pytest.raises(TypeError, match="not known before it is over"):
        len(stream())


def test_bad_rows_are_counted_or_an_error(build, tmp_path, caplog):
    with MDSWriter(out=str(tmp_path / "s"), columns={"messages": "json"}) as writer:
        for number in range(8):
            writer.write(chat(number) if number % 4 else {"messages": []})
    keys = {"local": str(tmp_path / "s"), "streaming": True, "packing": True}
    list(build(**keys))
    assert "epoch 0: dropped: {'no turns': 2}" in caplog.text
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^[^\n]*shard\.00000\.mds, row 0: no turns[^\n]*$"):
            list(build(**keys, strict=True, workers=workers))
    with pytest.raises(UserError, match="a whole window of 1 rows has nothing to train on: 1 x no turns"):
        list(build(**keys, packing_window=1))


def test_the_state_of_the_other_engine_is_refused(stream, build):
    with pytest.raises(UserError, match="set load_weights_only=true"):
        stream().dataset.load_state_dict(build().dataset.state_dict(4, True))
    with pytest.raises(UserError, match="set load_weights_only=true"):
        build().dataset.load_state_dict(stream().dataset.state_dict(4, True))
