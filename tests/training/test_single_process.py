"""What plain pip's torch 2.7 can do on a CPU, and every newer one: train and resume in one process."""

import signal
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.read import read_weights
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.ranks import GLOO_AVERAGES_GRADIENTS
from llmtrain.testing.recipe import tiny_recipe


def test_killed_and_restarted_run_is_the_same_bit_for_bit(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "single.yaml", corpus, save_interval="6ba", eval_loader=None)
    whole = launch(recipe, cwd=tmp_path)
    assert whole.code == 0, whole.output
    killed = Run(recipe, ["run_name=killed"], ranks=1, cwd=tmp_path)
    killed.wait_for("step 7 ")
    killed.send(signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    again = launch(recipe, ["run_name=killed"], cwd=tmp_path)
    assert again.code == 0, again.output
    assert "step 6" in again.output
    assert list(whole.metrics("loss/train/total")) == list(range(12))
    attention = manifest.read(whole.folder / "checkpoints/ep0-ba12").attention
    assert attention["reason"] in whole.output
    assert attention["reason"].startswith(f"attn_impl auto -> {attention['kernel']}")
    assert again.metrics("loss/train/total") == whole.metrics("loss/train/total")
    (_, expected), (_, weights) = (read_weights(run.folder / "checkpoints/ep0-ba12") for run in (whole, again))
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


@pytest.mark.skipif(GLOO_AVERAGES_GRADIENTS, reason="this torch averages gradients over gloo ranks")
def test_two_ranks_are_refused_where_gradients_would_be_summed(corpus: TinyCorpus, tmp_path: Path) -> None:
    run = launch(tiny_recipe(tmp_path / "refused.yaml", corpus), ranks=2, cwd=tmp_path)
    assert run.codes == (2, 2), run.output
    assert run.output.count("instead of the mean 1.5") == 1
    assert "torch >= 2.11" in run.output
    assert "Traceback" not in run.output
    assert not list(tmp_path.glob("runs/refused/checkpoints/ep*"))
