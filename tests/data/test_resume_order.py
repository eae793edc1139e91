"""The order of the samples: the same for any number of ranks and workers, and after a resume."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from streaming.base.batching import generate_work
from streaming.base.world import World

from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.text import build_text_loader
from llmtrain.testing.ranks import run_ranks

GLOBAL_BATCH = 16


def ids_of(batches):
    return [tuple(batch["sample_id"].tolist()) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_in_the_middle_of_an_epoch(loader, workers, stop):
    settings = {"shuffle": True, "shuffle_seed": 3, "workers": workers, "num_canonical_nodes": 4}
    whole = loader(**settings)
    first, second = ids_of(whole), ids_of(whole)
    del whole

    interrupted = loader(**settings)
    assert ids_of(interrupted) == first  # one epoch, then part of the second
    batches = iter(interrupted)
    seen = ids_of(next(batches) for _ in range(stop))
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert state["num_canonical_nodes"] == 4
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 8 * stop)
    del batches, interrupted

    resumed = loader(**settings)
    resumed.load_state_dict(state)
    rest = ids_of(resumed)
    flat = [i for batch in second for i in batch]
    assert [i for batch in seen + rest for i in batch][: len(flat) - 8] == flat[: len(flat) - 8]
    assert sorted(i for batch in seen + rest for i in batch) == sorted(flat)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_epoch_cut_short_is_no_longer_after_a_resume(loader, workers, stop):
    """Composer asks a resumed loader for a whole epoch of batches again."""
    settings = {"shuffle": True, "workers": workers, "build": {"epoch_batches": 4}}
    whole = loader(**settings)
    epochs = [ids_of(whole) for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [4, 4, 4]
    del whole

    interrupted = loader(**settings)
    assert ids_of(interrupted) == epochs[0]
    batches = iter(interrupted)
    assert ids_of(next(batches) for _ in range(stop)) == epochs[1][:stop]
    state = json.loads(json.dumps(interrupted.dataset.state_dict(8 * stop, True)))
    del batches, interrupted

    resumed = loader(**settings)
    resumed.load_state_dict(state)
    assert ids_of(resumed) == epochs[1][stop:]  # none, when the epoch was over
    assert ids_of(resumed) == epochs[2]


def test_an_epoch_is_as_long_as_the_loader_says_after_a_resume(loader):
    """Rows that make the canonical nodes equal come on top of `len`, where Composer stops."""
    settings = {"num_canonical_nodes": 60, "batch_size": 1, "build": {"epoch_batches": -1}}
    whole = loader(**settings)
    assert len(list(loader(num_canonical_nodes=60, batch_size=1))) > len(whole)
    assert len(list(whole)) == len(whole)
    resumed = loader(**settings)
    resumed.load_state_dict(whole.dataset.state_dict(5, True) | {"epoch": 0})
    assert len(list(resumed)) == len(whole) - 5


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_draws_no_random_number_of_the_model(loader, workers):
    made = loader(workers=workers)
    before = torch.get_rng_state()
    for _ in range(2):
        ids_of(made)
    assert torch.equal(torch.get_rng_state(), before)


def replicated(corpus):
    """Ids of four batches, and of the fourth after a resume, of ranks that get the same rows."""
    cfg = {"dataset": {"local": str(corpus.train), "max_seq_len": 32, "return_sample_ids": True, "replication": 2}}
    loaders = [
        build_text_loader(
            TextLoaderConfig.model_validate({**cfg, "num_workers": 0}),
            eos_token_id=0,
            tokenizer_fingerprint=corpus.tokenizer_fingerprint,
            vocab_size=320,
            device_batch_size=8,
            epoch_batches=4,
        )
        for _ in range(2)
    ]
    whole = ids_of(loaders[0])
    # Composer counts the samples of both ranks.
    loaders[1].load_state_dict(loaders[0].dataset.state_dict(3 * 8 * 2, True))
    return whole, ids_of(loaders[1])


def test_resume_of_replicated_ranks(corpus):
    first, second = run_ranks(replicated, 2, corpus)
    whole, rest = first
    assert first == second
    assert len(whole) == 4
    assert rest == whole[3:]


def test_seed_of_the_checkpoint_holds_and_is_told(loader, caplog):
    a = loader(shuffle=True, shuffle_seed=1)
    expected = ids_of(a)
    del a
    b = loader(shuffle=True, shuffle_seed=2)
    b.load_state_dict({"epoch": 0, "sample_in_epoch": 0, "num_canonical_nodes": 1, "shuffle_seed": 1})
    assert "shuffle_seed: the recipe says 2, the checkpoint 1" in caplog.text
    assert ids_of(b) == expected


@pytest.mark.parametrize("canonical", [4, 64])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_first", [0, 3 * GLOBAL_BATCH])
def test_global_batches_do_not_depend_on_ranks_workers_or_nodes(loader, shuffle, drop_first, canonical):
    """Simulated: Streaming's own plan of the work for other worlds."""
    dataset = loader(shuffle=shuffle, num_canonical_nodes=canonical).dataset

    def plan(nodes, ranks, workers):
        dataset.batch_size = GLOBAL_BATCH // (nodes * ranks)
        dataset._set_shuffle_block_size(World(nodes, ranks, workers, 0))
        work = generate_work("random", dataset, World(nodes, ranks, workers, 0), 0, drop_first)
        # (nodes, ranks, workers, batches of a worker, batch) -> one set of samples for each global batch
        by_batch = work.transpose(3, 2, 0, 1, 4).reshape(-1, GLOBAL_BATCH)
        return [sorted(batch[batch != -1].tolist()) for batch in by_batch if (batch != -1).any()]

    one = plan(1, 1, 1)
    full = len(one) - 1
    assert full > 10
    for world in [(1, 2, 1), (1, 4, 2), (1, 2, 3), (2, 2, 1), (2, 4, 2), (4, 1, 1)]:
        assert plan(*world)[:full] == one[:full], world


def test_another_seed_is_another_order(loader):
    orders = {seed: ids_of(loader(shuffle=True, shuffle_seed=seed)) for seed in (1, 2)}
    assert orders[1] != orders[2]
    assert orders[1] == ids_of(loader(shuffle=True, shuffle_seed=1))


SCRIPT = """
import json, os, sys
import torch.distributed as dist
from llmtrain.data.config import TextLoaderConfig
from llmtrain.data.text import build_text_loader

cfg, fingerprint, batch, out = json.loads(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + out + ".store", rank=int(os.environ["RANK"]),
                        world_size=int(os.environ["WORLD_SIZE"]))
loader = build_text_loader(TextLoaderConfig.model_validate(cfg), eos_token_id=0, tokenizer_fingerprint=fingerprint,
                           vocab_size=320, device_batch_size=batch)
ids = [b["sample_id"].tolist() for b in loader]
open(out + os.environ["RANK"], "w").write(json.dumps(ids))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.slow
def test_two_real_ranks_see_the_batches_of_one(loader, corpus, tmp_path):
    one = ids_of(loader(batch_size=GLOBAL_BATCH, shuffle=True))
    cfg = {
        "dataset": {"local": str(corpus.train), "max_seq_len": 32, "shuffle": True, "return_sample_ids": True},
        "num_workers": 1,
        "drop_last": False,
    }
    argument = json.dumps([cfg, corpus.tokenizer_fingerprint, GLOBAL_BATCH // 2, str(tmp_path / "ids")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, argument],
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    ranks = [json.loads((tmp_path / f"ids{rank}").read_text()) for rank in "01"]
    two = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    full = len(one) - 1
    assert two[:full] == [sorted(batch) for batch in one[:full]]
    assert np.unique(np.concatenate([np.concatenate(batch) for batch in [two]])).size == loader().dataset.num_samples


def made(corpus, batch_size, workers, **dataset):
    dataset = {"max_seq_len": 32, "shuffle": True, "return_sample_ids": True, **dataset}
    return build_text_loader(
        TextLoaderConfig.model_validate({"dataset": dataset, "num_workers": workers}),
        eos_token_id=0,
        tokenizer_fingerprint=corpus.tokenizer_fingerprint,
        vocab_size=320,
        device_batch_size=batch_size,
    )


def whole_and_resumed(corpus, dataset, batch_size, workers, states, stop):
    """An epoch; where a checkpoint stands after `stop` batches; and what each of the given states has left."""
    whole = ids_of(made(corpus, batch_size, workers, **dataset))
    stopped = made(corpus, batch_size, workers, **dataset)
    batches = iter(stopped)
    assert ids_of(next(batches) for _ in range(stop)) == whole[:stop]
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped._stop_workers()
    del batches, stopped
    rests = []
    for one in [*states, state]:
        resumed = made(corpus, batch_size, workers, **dataset)
        resumed.load_state_dict(one)
        rests.append(ids_of(resumed))
        resumed._stop_workers()
    return whole, state, rests


def in_order(ranks, how):
    """The batches of all ranks as one has them."""
    together = zip(*ranks, strict=True)
    if how == "stratified":  # each rank has a run of the batch
        return [sum(batches, ()) for batches in together]
    return [tuple(np.stack(batches, axis=1).flatten().tolist()) for batches in together]  # one row each, in turn


@pytest.mark.long
@pytest.mark.parametrize("how", ["per_stream", "one folder", "random", "stratified"])
def test_real_ranks_read_the_same_order_and_resume_each_others_states(corpus, how):
    streams = {"a": {"local": str(corpus.train), "proportion": 3}, "b": {"local": str(corpus.val), "proportion": 1}}
    dataset = {"local": str(corpus.train)} if how == "one folder" else {"streams": streams, "batching_method": how}
    states, one = [], None
    for ranks, workers in [(1, 0), (1, 2), (2, 2), (4, 0), (2, 0)]:
        found = run_ranks(whole_and_resumed, ranks, corpus, dataset, GLOBAL_BATCH // ranks, workers, states, 3)
        order = in_order([whole for whole, _, _ in found], how)
        one = one or order
        assert len(one) > 20
        assert order[: len(one) - 1] == one[:-1], (ranks, workers)
        states.append(found[0][1])
        for rests in zip(*(rests for _, _, rests in found), strict=True):
            rest = in_order(rests, how)
            assert rest[: len(one) - 4] == one[3:-1], (ranks, workers)
