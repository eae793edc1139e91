"""Faults of a run under `llmtrain launch`, with Composer's launcher and ranks that import for themselves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmtrain.launching.progress import progress
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import launch, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.gloo_training]  # launchers and ranks import twice

LOSS = "loss/train/total"


def ranks_of(supervisor: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process(supervisor.pid).children(recursive=True):
        try:
            if "llmtrain.training.command" in process.cmdline() and "RANK" in (variables := process.environ()):
                found[int(variables["RANK"])] = process
        except psutil.Error:
            continue
    return found


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def kill_rank(supervisor: subprocess.Popen[bytes]) -> None:
    ranks_of(supervisor)[1].kill()


def kill_launcher(supervisor: subprocess.Popen[bytes]) -> None:
    os.kill(psutil.Process(supervisor.pid).children()[0].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "inject", "said", "resumed"),
    [
        ("rank killed under llmtrain launch", kill_rank, "rank 1 was killed by SIGKILL after step", "10"),
        # The ranks save: their launcher is gone, and they are not.
        ("launcher killed under llmtrain launch", kill_launcher, "the launcher was killed by SIGKILL", "1"),
    ],
)
def test_what_is_killed_starts_again_and_no_bit_differs(
    name: str,
    inject: Callable[[subprocess.Popen[bytes]], None],
    said: str,
    resumed: str,
    corpus: TinyCorpus,
    tmp_path: Path,
) -> None:
    recipe = tiny_recipe(tmp_path / "killed.yaml", corpus, max_duration="60ba", save_interval="10ba", eval_loader=None)
    undisturbed = launch(recipe, ["run_name=undisturbed"], ranks=2, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed.output
    run, log = tmp_path / "runs/killed", tmp_path / "launch.log"

    def wait_until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not happened():
            assert time.monotonic() < deadline, log.read_text()
            assert supervisor.poll() is None, log.read_text()
            time.sleep(0.02)

    command = [sys.executable, "-m", "llmtrain", "launch", str(recipe), "--gpus-per-node", "2"]
    with log.open("w") as output:
        supervisor = subprocess.Popen(command, cwd=tmp_path, env=launcher_environment(), stdout=output, stderr=output)
        try:
            wait_until(lambda: progress(run, None).step >= 15)
            inject(supervisor)
            watch = Stopwatch()
            wait_until(lambda: said in log.read_text())
            detected = watch.seconds()
            wait_until(lambda: "continues after step" in log.read_text())
            wait_until(lambda: log.read_text().rpartition("continues after step")[2].count("train       step") > 0)
            recovered = watch.seconds()
            assert supervisor.wait(600) == 0, log.read_text()
        finally:
            supervisor.terminate()
    message = next(line for line in log.read_text().splitlines() if said in line)
    assert f"launch      restart 1 of 3 in 1 s, from step {resumed}" in log.read_text()
    assert read_metric(run, LOSS) == undisturbed.metrics(LOSS)
    assert same_state(run / "checkpoints/ep0-ba60", undisturbed.folder / "checkpoints/ep0-ba60") > 10
    observe(name, "started again, same bits", run=run, detected=detected, recovered=recovered, message=message)


def test_llmtrain_launch_is_killed_itself(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Nobody is left who could start the ranks again: they save and end."""
    recipe = tiny_recipe(
        tmp_path / "alone.yaml", corpus, max_duration="2000ba", save_interval="1000ba", eval_loader=None
    )
    run, log = tmp_path / "runs/alone", tmp_path / "launch.log"
    command = [sys.executable, "-m", "llmtrain", "launch", str(recipe), "--gpus-per-node", "2"]
    with log.open("w") as output:
        supervisor = subprocess.Popen(command, cwd=tmp_path, env=launcher_environment(), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 600
        while progress(run, None).step < 5:
            assert time.monotonic() < deadline, log.read_text()
            assert supervisor.poll() is None, log.read_text()
            time.sleep(0.02)
        family = psutil.Process(supervisor.pid).children(recursive=True)
        assert set(ranks_of(supervisor)) == {0, 1}
        before = progress(run, None).step
    finally:
        supervisor.kill()
    watch = Stopwatch()
    supervisor.wait()
    while any(lives(process) for process in family):
        assert watch.seconds() < 60, log.read_text()
        time.sleep(0.02)
    detected = watch.seconds()
    step = progress(run, run / "checkpoints").checkpoint
    assert step >= before
    again = launch(recipe, [f"max_duration={step + 1}ba"], ranks=2, cwd=tmp_path)
    assert again.code == 0, again.output
    message = next(line for line in again.output.splitlines() if "continues after step" in line)
    assert f"continues after step {step}" in message
    observe(
        "launcher killed: llmtrain launch itself",
        "all ranks save and end, nobody is left to show what they say; the same command continues, and says where",
        run=run,
        detected=detected,
        recovered=None,
        message=message,
    )
