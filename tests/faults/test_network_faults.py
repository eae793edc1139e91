"""The network between two hosts fails in the middle of training: both are network namespaces on this machine."""

import re
import sys
import time
from pathlib import Path

import pytest

from llmtrain.launching.progress import progress
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import launch, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.two_hosts import Host, HostProcess, two_hosts, why_not

_WHY_NOT = why_not() if sys.platform == "linux" else "network namespaces are Linux's"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.gloo_training,
    pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or ""),
]

LOSS = "loss/train/total"
PATIENCE = 900.0


def test_a_partition_is_named_and_torchrun_recovers_when_it_is_over(corpus: TinyCorpus, tmp_path: Path) -> None:
    """First for five seconds, which TCP gets over by itself; then for as long as it takes, with default limits."""
    recipe = tiny_recipe(tmp_path / "cut.yaml", corpus, max_duration="200ba", save_interval="10ba", eval_loader=None)
    undisturbed = launch(recipe, ["run_name=undisturbed"], ranks=2, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed.output
    run = tmp_path / "runs/cut"

    def output() -> str:
        return "\n".join(log.read_text(errors="replace") for log in sorted(tmp_path.glob("host*.log")))

    def last_step() -> int:
        return progress(run, None).step

    with two_hosts() as pair:

        def start(host: Host) -> HostProcess:
            launching = [sys.executable, "-m", "llmtrain", "launch", str(recipe), "--nodes", "2"]
            ranks = ["--gpus-per-node", "1", "--rdzv-endpoint", f"{pair.first.address}:29511"]
            log = tmp_path / f"host{host.address[-1]}.log"
            return host.start([*launching, *ranks], cwd=tmp_path, log=log, env=launcher_environment())

        def wait_until(happened, patience: float = PATIENCE) -> None:  # type: ignore[no-untyped-def]
            deadline = time.monotonic() + patience
            while not happened():
                assert time.monotonic() < deadline, output()
                assert all(process.process.poll() is None for process in both), output()
                time.sleep(0.05)

        both = [start(pair.first), start(pair.second)]
        wait_until(lambda: last_step() >= 15)
        pair.unplug()
        short = Stopwatch()
        time.sleep(5)
        before = last_step()
        pair.plug()
        wait_until(lambda: last_step() >= before + 2)
        over = short.seconds()
        assert "error (" not in output(), output()
        pair.unplug()
        cut = Stopwatch()
        wait_until(lambda: "is the network between their hosts up?" in output())
        named = cut.seconds()
        time.sleep(10)  # torchrun tries to meet the other host, and cannot
        before = last_step()
        assert "continues after step" not in output()
        pair.plug()
        back = Stopwatch()
        wait_until(lambda: "train       step" in output().partition("continues after step")[2])
        recovered = back.seconds()
        assert [process.wait(PATIENCE) for process in both] == [0, 0], output()
    text = output()
    message = next(line for line in text.splitlines() if "is the network between their hosts up?" in line)
    # The metrics of a step are written when the next one is.
    assert re.match(rf"error \(all ranks, after step ({before}|{before + 1})\): ", message), message
    assert [line for line in text.splitlines() if line.startswith("error (")] == [message]
    assert read_metric(run, LOSS) == undisturbed.metrics(LOSS)
    observe(
        "network partition for 5 s (link down and up)",
        "the run waits and goes on",
        run=run,
        detected=over,
        recovered=over,
        message="(nothing is said)",
    )
    observe(
        "network partition between two hosts (link down)",
        "ended by the watchdog, torchrun waits; recovered so long after the link was back, same bits",
        run=run,
        detected=named,
        recovered=recovered,
        message=message,
        starts_again=True,
    )
