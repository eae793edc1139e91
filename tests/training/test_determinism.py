"""`deterministic: true`: what it sets, what it refuses, and that two runs are the same bits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run
from llmtrain.testing.recipe import tiny_recipe

SETTINGS = """
import os, sys, torch
from pathlib import Path
from llmtrain.errors import UserError
from llmtrain.recipe.load import load_recipe
from llmtrain.training.determinism import set_determinism
try:
    set_determinism(load_recipe(sys.argv[1], sys.argv[2:]))
except UserError as error:
    print(error)
    raise SystemExit(2)
print(torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
      torch.backends.cudnn.deterministic, torch.backends.cuda.cudnn_sdp_enabled(),
      os.environ.get("CUBLAS_WORKSPACE_CONFIG"), os.environ.get("FLASH_ATTENTION_DETERMINISTIC"))
"""


def settings(recipe: Path, *overrides: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS, str(recipe), *overrides],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **environment},
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_what_is_set_and_only_where_it_is_asked_for(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus)
    assert settings(recipe, "deterministic=true") == "True False True False :4096:8 1"
    assert settings(recipe) == "False True False True None None"


@pytest.mark.slow
@pytest.mark.long
def test_what_the_environment_says_is_kept(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus)
    said = settings(recipe, "deterministic=true", CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0" in said


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["compile_config.mode=max-autotune"], "compile_config.mode"),
        (["model.attn_config.attn_impl=flex", "model.attn_config.flex_backend=flash"], "flex_backend"),
    ],
)
def test_what_cannot_be_deterministic_is_refused(
    overrides: list[str], key: str, corpus: TinyCorpus, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run.yaml", corpus)
    load_recipe(recipe, overrides)
    with pytest.raises(Exception, match=rf"{key}(.|\n)*deterministic: true"):
        load_recipe(recipe, [*overrides, "deterministic=true"])


def files(run: Path) -> dict[str, Any]:
    """What the last checkpoint holds, by file; and the losses."""
    return dict(manifest.read(run / "checkpoints" / "latest").files)


@pytest.mark.slow
@pytest.mark.gloo_training
def test_two_runs_are_the_same_bits_with_workers_and_under_load(corpus: TinyCorpus, tmp_path: Path) -> None:
    """At once, so that their threads and loader workers interleave in ways of their own."""
    recipe = tiny_recipe(
        tmp_path / "run.yaml", corpus, deterministic=True, max_duration="6ba", save_interval="6ba", eval_interval="6ba"
    )
    (tmp_path / "other").mkdir()
    runs = [
        Run(recipe, ["train_loader.num_workers=2", "train_loader.prefetch_factor=2"], ranks=2, cwd=tmp_path),
        Run(recipe, ["train_loader.num_workers=2", "train_loader.prefetch_factor=4"], ranks=2, cwd=tmp_path / "other"),
    ]
    ended = [run.wait() for run in runs]
    for run in ended:
        assert run.code == 0, run.output
        assert ", deterministic" in run.output
    one, other = ended
    assert one.metrics("loss/train/total") == other.metrics("loss/train/total")
    assert len(one.metrics("loss/train/total")) == 6
    same = weights(one.folder)
    assert same == weights(other.folder)
    assert len(same) > 10


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, weights and optimizer state, as bytes."""
    from llmtrain.checkpoint.sharded import ShardedTensors

    stored = ShardedTensors((run / "checkpoints" / "latest").resolve())
    return {name: stored.read(name).numpy().tobytes() for name in stored}
