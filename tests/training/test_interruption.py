"""Ctrl-C in a real run."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.exit_codes import INTERRUPTED

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]


def test_one_line_and_one_code_and_the_run_goes_on_later(corpus: TinyCorpus, tmp_path: Path) -> None:
    """All processes of a terminal get the signal; data workers are among them."""
    recipe = tiny_recipe(tmp_path / "r.yaml", corpus, max_duration="30ba", save_interval="5ba", eval_loader=None)
    run = Run(recipe, ["train_loader.num_workers=1"], ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    run.send(signal.SIGINT)
    finished = run.wait(60)
    assert finished.codes == (INTERRUPTED, INTERRUPTED), finished.output
    said = [line for line in finished.output.splitlines() if "Ctrl-C" in line]
    assert len(said) == 1, finished.output
    assert re.fullmatch(r"stopped     Ctrl-C after step \d+: the same command goes on .*", said[0])
    assert finished.output.rstrip().endswith(said[0])
    assert not re.search("Traceback|error", finished.output)
    assert manifest.verify(run.folder / "checkpoints/latest") == []
    again = launch(recipe, ["train_loader.num_workers=1"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    assert max(again.metrics("loss/train/total")) == 29  # counted from 0


@pytest.mark.long
def test_one_rank_alone(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = {"max_duration": "2000ba", "save_interval": "5ba", "eval_loader": None}
    run = Run(tiny_recipe(tmp_path / "r.yaml", corpus, **settings), ranks=2, cwd=tmp_path)
    run.wait_for("ep0-ba5  ")
    run.send(signal.SIGINT, [1])
    finished = run.wait(60)
    assert finished.codes[1] == INTERRUPTED, finished.output
    assert "because rank 1 failed: Ctrl-C (SIGINT)" in finished.output
    assert "Traceback" not in finished.output


def test_a_process_that_has_forked_does_not_wait_for_its_children() -> None:
    """They hold whatever was open, for as long as they live."""
    script = """
import os, signal, time
from llmtrain.training import interruption
with interruption.ends_this_process():
    if (child := os.fork()) == 0:
        time.sleep(600)
print("on")
os.kill(child, signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.stdout == "on\n"


def test_nothing_is_printed_behind_the_line() -> None:
    """The main thread goes on until the process ends; what it says then would hide what the user shall read."""
    script = """
import sys
from llmtrain.training import interruption
with interruption.ends_this_process():
    print("ready", flush=True)
    while True:
        print("train", file=sys.stderr, flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert said.rstrip().splitlines()[-1].startswith("stopped     Ctrl-C: ")
