"""The loader: what is trained, each example once, the same global batches anywhere, exact resumes, evaluations."""

import json

import numpy as np
import pytest
import torch
from composer.core.data_spec import default_split_batch

from llmtrain.data.batch import sample_ids
from llmtrain.data.finetuning.dataset import FinetuningDataset
from llmtrain.errors import UserError
from llmtrain.testing.ranks import run_ranks


def numbers(batches, tokenizer):
    """Of each batch the conversations that its rows hold, by the number that their answers begin with."""
    found = []
    for batch in batches:
        rows = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            trained = tokenizer.decode(ids[labels != -100])
            rows.append(tuple(int(answer.split(":")[0]) for answer in trained.split("<|im_end|>") if answer))
        found.append(rows)
    return found


def flat(batches):
    return [number for batch in batches for row in batch for number in row]


@pytest.fixture
def read(build, chat_tokenizer):
    """The conversations of a new loader's next epoch, or of a given one's."""

    def epoch(loader=None, **settings):
        return numbers(loader or build(**settings), chat_tokenizer)

    return epoch


@pytest.mark.parametrize("packing", [True, False])
def test_ids_and_labels_are_those_of_the_template(build, chat_tokenizer, packing):
    (batch,) = build(batch_size=200, packing=packing)
    assert ("sequence_id" in batch) == packing
    texts = set()
    for row in range(len(batch["input_ids"])):
        documents = batch["sequence_id"][row] if packing else batch["attention_mask"][row].long() - 1
        for number in range(int(documents.max()) + 1):
            here = documents == number
            ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
            text = chat_tokenizer.decode(ids)
            question, answer = text.split("<|im_start|>assistant\n")
            assert question.startswith("<|im_start|>user\nSay ")
            trained = labels != -100
            assert chat_tokenizer.decode(ids[trained]) == answer.rstrip("\n")
            assert torch.equal(labels[trained], ids[trained])
            texts.add(text)
    assert len(texts) == 120
    assert batch["attention_mask"].dtype == torch.bool
    assert (batch["input_ids"][~batch["attention_mask"]] == chat_tokenizer.pad_token_id).all()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_say_which_examples_they_have(build, chat_tokenizer, packing, workers):
    loader = build(shuffle=True, packing=packing, max_seq_len=256, workers=workers)
    batches = list(loader)
    assert [sample_ids(batch) for batch in batches] == [
        [list(row) for row in batch] for batch in numbers(batches, chat_tokenizer)
    ]
    assert max(len(row) for batch in batches for row in sample_ids(batch)) > 1 or not packing
    halves = [half for batch in batches for half in default_split_batch(batch, 2)]
    assert [row for half in halves for row in sample_ids(half)] == [row for b in batches for row in sample_ids(b)]
    assert sample_ids(loader.collate_fn([loader.dataset[row] for row in ([0, 3], [])])) == [[0, 3], []]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_each_example_once_in_a_new_order(build, read, packing):
    loader = build(shuffle=True, packing=packing, packing_window=16)
    first, second = read(loader), read(loader)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(120))
    assert first != second
    assert len(first) == len(loader)


def test_packing_needs_fewer_rows_than_examples(build):
    assert len(build(packing=True, max_seq_len=256)) <= 0.5 * len(build(max_seq_len=256))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_in_the_middle_of_an_epoch(build, read, workers, stop, chat_tokenizer):
    settings = {"shuffle": True, "packing": True, "packing_window": 16, "workers": workers}
    whole = build(**settings)
    first, second, third = read(whole), read(whole), read(whole)

    interrupted = build(**settings)
    assert read(interrupted) == first
    batches = iter(interrupted)
    assert numbers([next(batches) for _ in range(stop)], chat_tokenizer) == second[:stop]
    state = json.loads(json.dumps(interrupted.dataset.state_dict(4 * stop, True)))
    assert (state["epoch"], state["row_in_epoch"]) == (1, 4 * stop)

    resumed = build(**settings)
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.state_dict(4 * stop, True) == state  # a checkpoint before the first batch
    assert read(resumed) == second[stop:]
    assert read(resumed) == third


def test_between_two_epochs_the_state_names_the_next(build, read):
    whole = build(shuffle=True)
    read(whole)
    state = whole.dataset.state_dict(0, True)
    second = read(whole)
    resumed = build(shuffle=True)
    resumed.dataset.load_state_dict(state)
    assert read(resumed) == second


def test_a_checkpoint_of_the_last_batch_leaves_nothing_of_the_epoch(build, read):
    whole = build(shuffle=True)
    read(whole)
    state = whole.dataset.state_dict(120, True)
    second = read(whole)
    resumed = build(shuffle=True)
    resumed.dataset.load_state_dict(state)
    assert read(resumed) == []  # Composer ends the epoch with that
    assert read(resumed) == second


@pytest.mark.parametrize("stop", [1, 3])
def test_an_epoch_cut_short_is_no_longer_after_a_resume(build, read, stop):
    whole = build(shuffle=True, epoch_batches=3)
    first, second = read(whole), read(whole)
    assert [len(first), len(second)] == [3, 3]
    resumed = build(shuffle=True, epoch_batches=3)
    resumed.dataset.load_state_dict({**whole.dataset.state_dict(4 * stop, True), "epoch": 0})
    assert read(resumed) == first[stop:]
    assert read(resumed) == second


def of_ranks(loader, ranks, *, global_batch=12, resume=None, evaluation=False, drop_last=False):
    """Examples of each global batch, had the loader as many ranks; and how many rows each rank has."""
    data = loader.dataset
    made = [
        FinetuningDataset(
            data.stores,
            data.order,
            seed=3,
            device_batch_size=global_batch // ranks,
            rank=rank,
            ranks=ranks,
            drop_last=drop_last,
            same_epoch=evaluation,
        )
        for rank in range(ranks)
    ]
    rows = []
    for dataset in made:
        if resume:
            dataset.load_state_dict(resume)
        dataset.begin_epoch()
        rows.append([row.tolist() for row in dataset.rows_of_rank(dataset.epoch, dataset.row)])
    assert len({len(of_rank) for of_rank in rows}) == 1
    turns = [row for turn in zip(*rows, strict=True) for row in turn]
    return [sorted(turns[start : start + global_batch]) for start in range(0, len(turns), global_batch)]


@pytest.mark.parametrize("packing", [True, False])
def test_global_batches_do_not_depend_on_the_number_of_ranks(build, packing):
    loader = build(shuffle=True, packing=packing)
    one = of_ranks(loader, 1)
    for ranks in (2, 3, 4, 12):
        several = of_ranks(loader, ranks)
        assert several[:-1] == one[:-1]
        assert [row for row in several[-1] if row] == one[-1]  # and blank rows, at most one a rank
    assert (
        of_ranks(loader, 4, drop_last=True)
        == of_ranks(loader, 1, drop_last=True)
        == [batch for batch in one if len(batch) == 12]
    )


def test_a_run_of_four_ranks_goes_on_with_two(build):
    loader = build(shuffle=True, packing=True)
    one = of_ranks(loader, 1)
    state = loader.dataset.state_dict(24, True) | {"shuffle_seed": 3}
    for ranks in (1, 2, 4):
        rest = of_ranks(loader, ranks, resume=state)
        assert rest[:-1] == one[2:-1]
        assert [row for row in rest[-1] if row] == one[-1]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_reads_each_example_once(build, packing, ranks):
    loader = build(packing=packing, shuffle=True)
    batches = of_ranks(loader, ranks, evaluation=True)
    seen = [example for batch in batches for row in batch for example in row]
    assert sorted(seen) == list(range(120))


def test_an_evaluation_is_the_same_each_time_and_drops_nothing(build, read):
    loader = build(batch_size=50, evaluation=True, shuffle=True, drop_last=True)
    first = read(loader)
    assert read(loader) == first
    assert sorted(flat(first)) == list(range(120))
    assert read(batch_size=50, evaluation=True, shuffle=True) == first


def test_blank_rows_have_no_target(build):
    loader = build()
    batch = loader.collate_fn([loader.dataset[row] for row in ([0], [])])
    assert (batch["labels"][1] == -100).all()
    assert batch["attention_mask"][1].sum() == 1


def test_the_seed_of_the_checkpoint_holds_and_is_told(build, read, caplog):
    expected = read(shuffle=True, shuffle_seed=1)
    loader = build(shuffle=True, shuffle_seed=2)
    loader.dataset.load_state_dict({**loader.dataset.state_dict(0, True), "shuffle_seed": 1})
    assert "shuffle_seed: the recipe says 2, the checkpoint 1" in caplog.text
    assert read(loader) == expected


def test_other_examples_than_the_checkpoint_s_are_told(build, caplog):
    state = build().dataset.state_dict(8, True)
    build(limit=60).dataset.load_state_dict(state)
    assert "the examples, their mixture or their packing are others" in caplog.text


def test_the_state_of_a_text_loader_is_refused(build):
    with pytest.raises(UserError, match="set load_weights_only=true"):
        build().dataset.load_state_dict({"epoch": 0, "sample_in_epoch": 5, "shuffle_seed": 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_no_random_number_of_the_model(build, workers):
    loader = build(workers=workers, shuffle=True)
    before = torch.get_rng_state()
    for _ in range(2):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_next_batch_can_be_looked_at_and_is_not_taken(build):
    loader = build(shuffle=True, packing=True)
    rows, seen = loader.next_batch()
    first = next(iter(loader))
    assert all(torch.equal(seen[key], first[key]) for key in first)
    assert len(rows) == 4


def test_too_few_rows_for_a_batch(build):
    with pytest.raises(UserError, match="120 examples in 120 rows: not one full batch of 500"):
        build(batch_size=500, drop_last=True)
    assert len(build(batch_size=500)) == 1


def test_a_mixture_by_proportions(build, read, chats):
    streams = {
        "few": {"files": str(chats), "limit": 10, "proportion": 1},
        "many": {"files": str(chats), "proportion": 3},
    }
    loader = build(streams=streams, epoch_size=40, shuffle=True)
    epochs = [flat(read(loader)) for _ in range(4)]
    assert all(len(epoch) == 40 for epoch in epochs)
    counts = np.bincount(np.concatenate(epochs), minlength=120)
    assert (counts[:10] == 5).all()  # 4 times from the ten, once from all
    assert (counts[10:] == 1).all()


def of_this_rank(build_config, tokenizer, degree=1):
    from llmtrain.data.finetuning.config import FinetuningLoaderConfig
    from llmtrain.data.finetuning.loader import build_finetuning_loader
    from llmtrain.tokenizer import TokenizerConfig, load_tokenizer

    opened = load_tokenizer(TokenizerConfig(name=tokenizer, chat_template="chatml"))
    cfg = FinetuningLoaderConfig.model_validate({"dataset": build_config, "num_workers": 0, "drop_last": False})
    try:
        loader = build_finetuning_loader(
            cfg, tokenizer=opened, vocab_size=4096, device_batch_size=6, sequence_parallel_degree=degree
        )
    except UserError as problem:
        return str(problem)
    return numbers(loader, opened)


def test_two_real_ranks(read, corpus, chats, tmp_path):
    cfg = {"files": str(chats), "max_seq_len": 128, "shuffle": True, "packing": True, "cache_dir": str(tmp_path)}
    first, second = run_ranks(of_this_rank, 2, cfg, str(corpus.tokenizer))
    both = [sorted(a + b) for a, b in zip(first, second, strict=True)]
    one = [sorted(batch) for batch in read(batch_size=12, shuffle=True, packing=True)]
    assert both[:-1] == one[:-1]
    assert [row for row in both[-1] if row] == one[-1]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    shared = run_ranks(of_this_rank, 2, cfg, str(corpus.tokenizer), 2)
    assert shared[0] == shared[1] == list(read(batch_size=6, shuffle=True, packing=True))


def test_what_the_first_rank_cannot_do_is_an_error_on_all(corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "", "response": ""}\n')
    cfg = {"files": str(bad), "max_seq_len": 128, "cache_dir": str(tmp_path / "cache")}
    answers = run_ranks(of_this_rank, 2, cfg, str(corpus.tokenizer))
    assert all("there is nothing to train on: all 1 rows were dropped" in answer for answer in answers)
    answers = run_ranks(of_this_rank, 2, {**cfg, "files": str(tmp_path / "no.jsonl")}, str(corpus.tokenizer))
    assert all("no file matches" in answer for answer in answers)
