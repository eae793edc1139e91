"""The parts of `make storywriter` on real text: windows of 4,096 tokens instead of 65,536, from a base of two steps."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.evaluation.command import eval_command
from llmtrain.prep.run import prepare
from llmtrain.testing.launch import Finished, launch

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

RECIPE = "yamls/mpt-tiny-storywriter.yaml"
SHORT = ["max_seq_len=4096", "max_duration=2ba", "eval_interval=2ba"]


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the target needs of the repository, with its data and a base model that has hardly learned anything."""
    folder = tmp_path_factory.mktemp("storywriter")
    for name in ("Makefile", "yamls", "data_prep"):
        source = repository / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(Path("data_prep/tiny.yaml"), ["sources.1.max_bytes=1_000_000", "tokenizer.train.max_bytes=1_000_000"])
        prepare(Path("data_prep/tiny-storywriter.yaml"))
    short = ["max_duration=2ba", "eval_first=false", "eval_interval=0"]
    base = launch(folder / "yamls/mpt-tiny.yaml", short, ranks=2, cwd=folder)
    assert base.code == 0, base.output
    return folder


@pytest.fixture(scope="module")
def run(checkout: Path) -> Finished:
    return launch(checkout / RECIPE, SHORT, ranks=2, cwd=checkout)


def test_the_target_runs_the_recipes(repository: Path) -> None:
    dry = ["make", "-n", "-o", "setup", "storywriter"]
    said = subprocess.run(dry, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert "prep data_prep/tiny-storywriter.yaml" in said
    assert f"train.py {RECIPE} max_seq_len=65536 run_name=mpt-tiny-storywriter" in said
    assert said.index("yamls/mpt-tiny.yaml") < said.index(RECIPE)


def test_the_data_are_rows_of_65536_tokens_of_long_documents(checkout: Path, run: Finished) -> None:
    made = json.loads((checkout / "data/tiny-storywriter/prep.json").read_text())
    train, val = made["splits"]["train"], made["splits"]["val"]
    assert made["max_seq_len"] == 65536
    assert train["documents"] >= 4  # the language reference, and packages
    assert train["samples"] >= 8  # at least 4 steps of 2
    assert train["samples"] * 65536 == train["tokens"] + train["repeated_tokens"]
    assert val["documents"] == 1
    assert val["samples"] >= 2


def test_it_continues_from_the_base_model_as_another_function(run: Finished) -> None:
    assert run.code == 0, run.output
    assert "model.attn_config.clip_qkv is 6.0 in the recipe" in run.output
    losses = run.metrics("metrics/eval/LanguageCrossEntropy")
    assert list(losses) == [0, 2]
    assert losses[2] < losses[0]


def test_it_leaves_a_picture_of_losses_by_position(run: Finished) -> None:
    taken = json.loads((run.folder / "loss_by_position.json").read_text())
    assert [(row["step"], row["by_position"][-1]["last"]) for row in taken] == [(0, 4095), (2, 4095)]
    assert all(row["targets"] == 2 * 4095 for row in taken)
    assert (run.folder / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_evaluated_at_other_lengths(run: Finished, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    found = eval_command(run.folder, lengths=[1024, 8192], max_tokens=8192, device="cpu")
    assert [(at["max_seq_len"], at["targets"]) for at in found["lengths"]] == [(1024, 8191), (8192, 8191)]
    short, long = (at["loss"] for at in found["lengths"])
    assert long < short + 0.1
    with pytest.raises(UserError, match=r"max_seq_len 131,072: .*cannot be joined"):
        eval_command(run.folder, lengths=[131072], device="cpu")
