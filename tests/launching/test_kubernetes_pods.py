"""What a manifest's containers run, as processes of this machine in the place of pods."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llmtrain.launching.kubernetes import KubernetesOptions, manifest
from llmtrain.launching.plan import PORT, LaunchPlan
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe

STEPS = 60


class Pods:
    """The pods of a job on this machine.

    Args:
        text: the manifest.
        cwd: stands for the volume.
    """

    def __init__(self, text: str, cwd: Path) -> None:
        job = list(yaml.safe_load_all(text))[-1]
        self.spec, self.name, self.cwd = job["spec"]["template"]["spec"], job["metadata"]["name"], cwd
        self.rules = job["spec"]["podFailurePolicy"]["rules"]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]

    def start(self, index: int) -> subprocess.Popen[bytes]:
        """One pod; its output is appended to pod-INDEX.log."""
        (container,) = self.spec["containers"]
        # Kubernetes' DNS, and a port that is free.
        first = f"{self.name}-0.{self.spec['subdomain']}:{PORT}"
        assert first in container["command"]
        words = [f"127.0.0.1:{self.port}" if word == first else word for word in container["command"]]
        variables = {each["name"]: each["value"].replace("$$(", "$(") for each in container.get("env", [])}
        environment = {
            **launcher_environment(),
            **variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "JOB_COMPLETION_INDEX": str(index),
            "HOSTNAME": f"{self.name}-{index}",
        }
        with (self.cwd / f"pod-{index}.log").open("ab") as log:
            return subprocess.Popen(words, cwd=self.cwd, env=environment, stdout=log, stderr=log)

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-6000:] for log in sorted(self.cwd.glob("pod-*.log")))

    def action(self, code: int) -> str | None:
        """What the Job does about an exit code."""
        codes = ((rule["action"], rule["onExitCodes"]["values"]) for rule in self.rules if "onExitCodes" in rule)
        return next((action for action, values in codes if code in values), None)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_two_pods_train_and_an_evicted_one_is_replaced(corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "tiny.yaml", corpus, max_duration=f"{STEPS}ba", save_interval="20ba")
    (tmp_path / "undisturbed").mkdir()
    undisturbed = launch(recipe, ranks=2, cwd=tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output

    plan = LaunchPlan(recipe, run_name="tiny", nodes=2, min_nodes=2, gpus_per_node=1, environment={"A": "$(B)"})
    options = KubernetesOptions(image="x", volume_claims=(f"training:{tmp_path}",), grace=120)
    pods = Pods(manifest(plan, options, save_folder="runs/{run_name}/checkpoints"), tmp_path)
    run = tmp_path / "runs" / "tiny"
    processes = [pods.start(index) for index in (0, 1)]
    try:
        deadline = time.monotonic() + 600
        while not (run / "metrics.jsonl").exists() or max(read_metric(run, "loss/train/total"), default=0) < 5:
            assert time.monotonic() < deadline, pods.output()
            assert all(process.poll() is None for process in processes), pods.output()
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)  # evicted
        code = processes[1].wait(pods.spec["terminationGracePeriodSeconds"])
        assert (code, pods.action(code)) == (143, "Ignore"), pods.output()
        processes[1] = pods.start(1)
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], pods.output()
    losses, expected = read_metric(run, "loss/train/total"), undisturbed.metrics("loss/train/total")
    assert sorted(losses) == sorted(expected) == list(range(1, STEPS + 1))
    assert [losses[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)
