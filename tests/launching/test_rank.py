"""A rank below torchrun: the exit code that comes again, and numbers of hosts that do not fit."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.launching import rank
from llmtrain.launching.node_rank import complete_environment
from llmtrain.launching.progress import Progress, progress
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe


def trains(monkeypatch: pytest.MonkeyPatch, code: int) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr("llmtrain.training.command.main", lambda arguments: calls.append(1) or code)
    return calls


@pytest.mark.parametrize("code", [2, 3])
def test_a_pointless_code_is_not_tried_again(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_VERDICT", str(tmp_path / "runs/.tiny.verdict"))
    monkeypatch.delenv("LLMTRAIN_ELASTIC", raising=False)
    calls = trains(monkeypatch, code)
    for restart in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        assert rank.main(["tiny.yaml"]) == code
    assert len(calls) == 1


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_other_codes_are_tried_again(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_VERDICT", str(tmp_path / "verdict"))
    calls = trains(monkeypatch, code)
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        assert rank.main(["tiny.yaml"]) == code
    assert len(calls) == 2


def test_a_verdict_of_an_earlier_launch_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "verdict").write_text("2")
    os.utime(tmp_path / "verdict", (1, 1))
    monkeypatch.setenv("LLMTRAIN_VERDICT", str(tmp_path / "verdict"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    trains(monkeypatch, 0)
    assert rank.main(["tiny.yaml"]) == 0


def test_a_verdict_of_another_host_counts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts this host's ranks again because the other's have failed, and says that it is the first time."""
    (tmp_path / "verdict").write_text("2")  # after our launcher was started
    monkeypatch.setenv("LLMTRAIN_VERDICT", str(tmp_path / "verdict"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    calls = trains(monkeypatch, 0)
    assert rank.main(["tiny.yaml"]) == 2
    assert not calls


def test_a_verdict_of_an_earlier_launch_is_not_obeyed_later_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun started by hand, as `--print` shows it: nobody has removed it before."""
    verdict = tmp_path / "verdict"
    verdict.write_text("2")
    os.utime(verdict, (1, 1))
    monkeypatch.setenv("LLMTRAIN_VERDICT", str(verdict))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    calls = trains(monkeypatch, 1)
    assert rank.main(["tiny.yaml"]) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert rank.main(["tiny.yaml"]) == 1
    assert len(calls) == 2


def test_ranks_wait_for_a_number_of_hosts_that_fits(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "tiny.yaml", corpus)
    environment = {**os.environ, "LLMTRAIN_ELASTIC": "1", "RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.launching.rank", str(recipe)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "waiting for another number of hosts: global_train_batch_size: 8 samples" in line
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    process.communicate()


def test_torchrun_calls_the_nodes_rank_group_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.delenv("NODE_RANK", raising=False)
    complete_environment()
    assert os.environ["NODE_RANK"] == "1"
    monkeypatch.setenv("NODE_RANK", "5")
    complete_environment()
    assert os.environ["NODE_RANK"] == "5"


def test_progress_reads_what_is_whole(tmp_path: Path) -> None:
    assert progress(tmp_path, None) == Progress(-1, -1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 8}\n{"step": 9}\n{"step": 1')
    for name in ("ep0-ba8", "ep1-ba120", "ep0-ba999.tmp", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert progress(tmp_path, tmp_path / "checkpoints") == Progress(120, 9)
    assert progress(tmp_path, tmp_path / "nowhere") == Progress(-1, 9)
    assert Progress(120, 9).further_than(Progress(80, 9))
    assert not Progress(80, 5).further_than(Progress(80, 9))
