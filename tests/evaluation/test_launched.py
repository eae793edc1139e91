"""The shipped recipe as a user starts it: on two ranks of a real launcher, with the numbers of one process."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llmtrain.evaluation.command import eval_command
from llmtrain.model.mpt import MPT
from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("launcher", ["composer", "torchrun"])
def test_the_shipped_recipe_on_two_ranks(
    launcher: str, corpus: TinyCorpus, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    recipe = tiny_recipe(tmp_path / "x.yaml", corpus)
    checkpoints = tmp_path / "runs" / "x" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "recipe.yaml").write_text(recipe.read_text())
    torch.manual_seed(0)
    state = {f"model.{name}": value for name, value in MPT(load_recipe(recipe).model).state_dict().items()}
    torch.save({"state": {"model": state}}, checkpoints / "ep0-ba5.pt")
    arguments = [
        "yamls/eval/mpt-tiny.yaml",
        f"load_path={checkpoints / 'ep0-ba5.pt'}",
        f"eval_loader.0.dataset.local={corpus.val.parent}",
        "max_tokens=4000",
    ]
    sharded = "fsdp_config={sharding_strategy: FULL_SHARD}"
    programs = Path(sys.executable).parent
    start = {
        "composer": [programs / "composer", "-n", "2", "-c", programs / "llmtrain", "eval"],
        "torchrun": [programs / "torchrun", "--nproc-per-node", "2", "-m", "llmtrain", "eval"],
    }[launcher]
    command = [*map(str, start), *arguments, sharded, "--output", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("written ") == 1  # the first rank alone prints
    two = json.loads((tmp_path / "two.json").read_text())
    monkeypatch.chdir(repository)
    one = eval_command(Path(arguments[0]), arguments[1:], output=tmp_path / "one", console=Console(file=io.StringIO()))
    assert (two["ranks"], two["sharded"], one["ranks"], one["sharded"]) == (2, True, 1, False)
    assert [at["label"] for at in one["lengths"]] == ["validation", "docs"]
    for a, b in zip(one["lengths"], two["lengths"], strict=True):
        assert (a["targets"], a["bytes"]) == (b["targets"], b["bytes"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert len(one["tasks"]) >= 5
    assert [(t["task"], t["metric"], t["value"]) for t in one["tasks"]] == [
        (t["task"], t["metric"], pytest.approx(t["value"], abs=1e-9)) for t in two["tasks"]
    ]
    assert one["averages"] == pytest.approx(two["averages"])
