"""Two hosts, each a network namespace: Composer's flags, torchrun, a host that is lost and one that does not come back.

Real launchers and ranks that import for themselves; one test of these stays in the gate.
"""

import sys
import time
from pathlib import Path

import pytest

from llmtrain.launching.progress import progress
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import launch, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state
from llmtrain.testing.two_hosts import Host, HostProcess, TwoHosts, two_hosts, why_not

_WHY_NOT = why_not() if sys.platform == "linux" else "network namespaces are Linux's"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.gloo_training,
    pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or ""),
]

LOSS = "loss/train/total"
PATIENCE = 900.0
"""Seconds for launchers and ranks to import on a busy machine."""


class Hosts:
    """`llmtrain launch` on both hosts, in one working directory."""

    def __init__(self, hosts: TwoHosts, recipe: Path, *options: str) -> None:
        self.hosts = hosts
        self.recipe = recipe
        self.cwd = recipe.parent
        self.options = options
        self.run = self.cwd / "runs" / recipe.stem

    def log(self, host: Host) -> Path:
        return self.cwd / f"host{host.address[-1]}.log"

    def start(self, host: Host, *more: str) -> HostProcess:
        launching = [sys.executable, "-m", "llmtrain", "launch", str(self.recipe), "--nodes", "2"]
        ranks = ["--gpus-per-node", "1", "--rdzv-endpoint", f"{self.hosts.first.address}:29511"]
        command = [*launching, *ranks, *self.options, *more]
        return host.start(command, cwd=self.cwd, log=self.log(host), env=launcher_environment())

    def wait_for_step(self, step: int, *alive: HostProcess) -> None:
        self.wait_until(lambda: progress(self.run, None).step >= step, *alive)

    def wait_for(self, text: str, *alive: HostProcess) -> None:
        self.wait_until(lambda: text in self.output(), *alive)

    def wait_until(self, happened, *alive: HostProcess) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, self.output()
            assert all(process.process.poll() is None for process in alive), self.output()
            time.sleep(0.05)

    def output(self) -> str:
        logs = (self.log(self.hosts.first), self.log(self.hosts.second))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())

    def ended(self, *processes: HostProcess) -> None:
        codes = [process.wait(PATIENCE) for process in processes]
        assert codes == [0] * len(codes), self.output()


@pytest.mark.parametrize(
    ("launcher", "lost", "how"),
    [
        ("torchrun", 1, "killed"),
        ("torchrun", 1, "without power"),
        ("torchrun", 0, "killed"),  # where the rendezvous is
        ("composer", 1, "killed"),
        ("composer", 0, "without power"),
    ],
)
def test_a_lost_host_comes_back_and_no_bit_differs(
    launcher: str, lost: int, how: str, corpus: TinyCorpus, tmp_path: Path
) -> None:
    """`llmtrain launch` is started there again."""
    recipe = tiny_recipe(tmp_path / "hosts.yaml", corpus, max_duration="60ba", save_interval="10ba", eval_loader=None)
    undisturbed = launch(recipe, ["run_name=undisturbed"], ranks=2, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed.output
    with two_hosts() as pair:
        hosts = Hosts(pair, recipe)
        both = [pair.first, pair.second]
        numbered = [["--node-rank", str(rank)] if launcher == "composer" else [] for rank in (0, 1)]
        running = [hosts.start(host, *options) for host, options in zip(both, numbered, strict=True)]
        hosts.wait_for_step(15, *running)
        running[lost].lose(pair.unplug if how == "without power" else None)
        watch, log, other = Stopwatch(), hosts.log(both[1 - lost]), running[1 - lost]
        hosts.wait_until(lambda: "error (rank" in log.read_text(errors="replace"), other)
        detected = watch.seconds()
        if how == "without power":
            pair.plug()
        running[lost] = hosts.start(both[lost], *numbered[lost])
        hosts.ended(*running)
    output = hosts.output()
    (message,) = [line for line in output.splitlines() if line.startswith("error (")]
    assert message.startswith(f"error (rank {lost}, after step "), message
    assert "its heart stopped" in message
    assert "continues after step" in output, output
    assert read_metric(hosts.run, LOSS) == undisturbed.metrics(LOSS)
    end = "checkpoints/ep0-ba60"
    assert same_state(hosts.run / end, undisturbed.folder / end) > 10
    what = "all of its processes killed" if how == "killed" else "the cable is pulled, then they are killed"
    observe(
        f"host lost: {what}; rank {lost}, {launcher}",
        "named by the other host, which waits; the same line there again, and the run goes on, same bits",
        run=hosts.run,
        detected=detected,
        recovered=None,
        message=message,
    )


def test_composers_launcher_trains_on_two_hosts(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "composer.yaml", corpus, max_duration="6ba")
    with two_hosts() as pair:
        hosts = Hosts(pair, recipe)
        numbered = [hosts.start(host, "--node-rank", str(rank)) for rank, host in enumerate((pair.first, pair.second))]
        hosts.ended(*numbered)
    output = hosts.output()
    assert "--world_size 2 --node_rank 1 --master_addr" in output
    assert "GLOO_SOCKET_IFNAME=llm" in output
    assert "2 rank(s)" in output
    assert (hosts.run / "checkpoints/ep0-ba6/__1_0.distcp").exists()


def test_the_run_goes_on_without_a_host_that_does_not_come_back(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Elastic: the same global batches on fewer ranks."""
    plain = {"model": {"resid_pdrop": 0.0}}
    recipe = tiny_recipe(
        tmp_path / "elastic.yaml",
        corpus,
        model={
            **{"name": "mpt_causal_lm", "init_device": "mixed", "d_model": 48, "n_heads": 3, "n_layers": 2},
            **{"vocab_size": corpus.vocab_size, "no_bias": True, "attn_config": {"alibi": True}},
            **plain["model"],
        },
        max_duration="60ba",
        save_interval="10ba",
        eval_loader=None,
    )
    undisturbed = launch(recipe, ["run_name=undisturbed"], ranks=2, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed.output
    with two_hosts() as pair:
        hosts = Hosts(pair, recipe, "--min-nodes", "1", "--rdzv-conf", "last_call_timeout=10")
        first, second = hosts.start(pair.first), hosts.start(pair.second)
        hosts.wait_for_step(15, first, second)
        second.lose()
        hosts.ended(first)
    assert "2 rank(s)" in hosts.output()
    assert "1 rank(s)" in hosts.output()
    mine, theirs = read_metric(hosts.run, LOSS), undisturbed.metrics(LOSS)
    assert sorted(mine) == sorted(theirs)
    assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-5)


def test_a_mistake_is_not_tried_again(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Exit code 2 of ranks under torchrun, which restarts whatever failed."""
    recipe = tiny_recipe(tmp_path / "mistake.yaml", corpus, max_duration="6ba")
    with two_hosts() as pair:
        hosts = Hosts(pair, recipe, "load_path=runs/nowhere")
        both = [hosts.start(pair.first), hosts.start(pair.second)]
        assert [process.wait(PATIENCE) for process in both] == [2, 2], hosts.output()
    output = hosts.output()
    assert output.count("runs/nowhere: no such file or folder") <= 2, output  # one a host
    assert "Not started again" in output


def test_sigterm_to_all_hosts_saves_and_the_same_command_continues(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Torchrun sends it to each process of a rank, its data workers too."""
    recipe = tiny_recipe(tmp_path / "term.yaml", corpus, max_duration="200ba", save_interval="1000ba", eval_loader=None)
    with two_hosts() as pair:
        hosts = Hosts(pair, recipe, "train_loader.num_workers=1")
        both = [hosts.start(pair.first), hosts.start(pair.second)]
        hosts.wait_for_step(10, *both)
        for process in both:
            process.process.terminate()  # `ip netns exec` and the shell have become llmtrain
        assert [process.wait(PATIENCE) for process in both] == [143, 143], hosts.output()
        saved = sorted((hosts.run / "checkpoints").glob("ep0-ba*"))
        assert len(saved) == 1, hosts.output()
        hosts.ended(hosts.start(pair.first), hosts.start(pair.second))
    assert "SIGTERM: stopped after step" in hosts.output()
