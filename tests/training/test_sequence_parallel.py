"""Ranks that share sequences train the same model as one rank: losses, evaluations, counts, data and checkpoints."""

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

SHARED = "sequence_parallel_degree=2"
METRICS = ("loss/train/total", "metrics/eval/LanguageCrossEntropy", "metrics/eval/TokenAccuracy")
COUNTS = ("time/token", "time/sample", "time/batch")


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, whose random numbers differ from rank to rank; slices of 33, 32 tokens; documents apart."""
    model = {"name": "mpt_causal_lm", "d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": corpus.vocab_size}
    model |= {"init_device": "mixed", "attn_config": {"alibi": True, "attn_uses_sequence_id": True}}
    folder = tmp_path_factory.mktemp("shared")
    loader = {"name": "text", "num_workers": 0, "dataset": {"local": str(corpus.train), "shuffle": True,
              "num_canonical_nodes": 4, "eos_token_id": 0}}  # fmt: skip
    return tiny_recipe(
        folder / "shared.yaml",
        corpus,
        model=model,
        max_seq_len=63,
        max_duration="6ba",
        eval_interval="3ba",
        save_interval="3ba",
        train_loader=loader,
        callbacks={
            "speed_monitor": {"window_size": 1},
            "loss_by_position": {},
            "generate_callback": {"prompts": ["The"], "max_new_tokens": 3, "interval": "6ba"},
        },
    )


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Finished:
    run = launch(recipe, ["run_name=alone"], cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


def assert_same(run: Finished, alone: Finished) -> None:
    assert run.code == 0, run.output
    for key in METRICS:
        assert run.metrics(key) == pytest.approx(alone.metrics(key), rel=1e-5), key
    for key in COUNTS:
        assert run.metrics(key) == alone.metrics(key), key
    last, expected = (manifest.read(each.folder / "checkpoints/ep0-ba6") for each in (run, alone))
    assert last.tokens == expected.tokens == 6 * 8 * 63


@pytest.fixture(scope="module")
def shared(recipe: Path) -> Finished:
    return launch(recipe, [SHARED, "run_name=shared"], ranks=2, cwd=recipe.parent)


def test_two_ranks_with_a_sequence_train_what_one_does(shared: Finished, alone: Finished) -> None:
    assert_same(shared, alone)
    assert "1 group(s) of 2 ranks that share sequences" in shared.output
    speed = shared.metrics("throughput/device/tokens_per_sec")
    flops = shared.metrics("throughput/device/flops_per_sec")
    one, one_flops = (alone.metrics(f"throughput/device/{name}_per_sec") for name in ("tokens", "flops"))
    for step, value in flops.items():  # as many operations for a token, whoever computes them
        assert value / speed[step] == pytest.approx(one_flops[step] / one[step], rel=1e-3)
    curves, expected = (json.loads((run.folder / "loss_by_position.json").read_text()) for run in (shared, alone))
    assert [row["targets"] for row in curves] == [row["targets"] for row in expected]
    assert [row["loss"] for row in curves] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert "sample      step 6  The" in shared.output


@pytest.mark.long
def test_two_groups_of_two_ranks_and_data_parallel_gradients(recipe: Path, alone: Finished) -> None:
    run = launch(recipe, [SHARED, "run_name=groups", "device_eval_batch_size=2"], ranks=4, cwd=recipe.parent)
    assert_same(run, alone)


def test_a_checkpoint_continues_with_another_degree(recipe: Path, alone: Finished, shared: Finished) -> None:
    folder = shared.folder.with_name("continued")
    shutil.copytree(shared.folder, folder, symlinks=True)
    shutil.rmtree(folder / "checkpoints/ep0-ba6")
    run = launch(recipe, ["run_name=continued"], cwd=recipe.parent)
    assert_same(run, alone)
    assert "step 3" in run.output


def test_unsharded_ranks_share_sequences_too(recipe: Path, alone: Finished) -> None:
    run = launch(recipe, [SHARED, "run_name=ddp", "fsdp_config.sharding_strategy=NO_SHARD"], ranks=2, cwd=recipe.parent)
    assert_same(run, alone)


def test_ranks_that_cannot_be_grouped(recipe: Path) -> None:
    run = launch(recipe, [SHARED, "run_name=odd"], ranks=1, cwd=recipe.parent)
    assert run.code == 2
    assert "1 ranks cannot be grouped by 2" in run.output
    assert "Traceback" not in run.output
