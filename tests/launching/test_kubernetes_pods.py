"""What a manifest's containers run, with processes of this machine in the place of pods.

Each has what Kubernetes would give it: an address, process ids, a host name and a /dev/shm of its own, the names of the
manifest's Service, the volume. A pod that comes back has another address.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from llmtrain.launching.kubernetes import KubernetesOptions, manifest
from llmtrain.launching.plan import LaunchPlan
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch, launcher_environment, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state
from llmtrain.testing.two_hosts import Host, TwoHosts, two_hosts, why_not

_WHY_NOT = why_not() if sys.platform == "linux" else "network namespaces are Linux's"
_ALONE = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
LOSS = "loss/train/total"
PATIENCE = 900.0
"""Seconds for launchers and ranks to import on a busy machine."""


class Pod:
    """One of the Job's: from its start to its end.

    Args:
        spec: of the manifest's pods.
        name: of the pod, and its host name.
        host: where it runs.
        volume: the folder that stands for the claim.
    """

    def __init__(self, spec: dict[str, Any], name: str, host: Host, volume: Path) -> None:
        (container,) = spec["containers"]
        assert container["workingDir"] == str(volume)
        variables = {each["name"]: each["value"].replace("$$(", "$(") for each in container["env"]}
        cores = ",".join(map(str, host.cores))
        inside = ["taskset", "--cpu-list", cores, "ip", "netns", "exec", host.namespace]
        inside += ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside += ["sh", "-c", _ALONE, name]
        environment = {
            **launcher_environment(),
            **variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "JOB_COMPLETION_INDEX": name.rpartition("-")[2],
        }
        command = [word.replace("$$(", "$(") for word in container["command"]]
        with (volume / f"{name}.log").open("ab") as log:
            self.process = subprocess.Popen([*inside, *command], cwd=volume, env=environment, stdout=log, stderr=log)

    def evict(self) -> None:
        """SIGTERM to the container's first process."""
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(signal.SIGTERM)


class Cluster:
    """Two nodes, and the names that the Job's Service gives to pods.

    Args:
        hosts: the nodes.
        text: the manifest.
        volume: the folder that stands for the claim.
    """

    def __init__(self, hosts: TwoHosts, text: str, volume: Path) -> None:
        service, job = yaml.safe_load_all(text)
        self.spec, self.rules = job["spec"]["template"]["spec"], job["spec"]["podFailurePolicy"]["rules"]
        self.name, self.subdomain = job["metadata"]["name"], service["metadata"]["name"]
        assert self.spec["subdomain"] == self.subdomain
        self.nodes, self.volume = (hosts.first, hosts.second), volume
        self.addresses = [node.address for node in self.nodes]
        self.names = [Path("/etc/netns") / node.namespace for node in self.nodes]
        for folder in self.names:
            folder.mkdir(parents=True)
        self._tell_names()

    def start(self, index: int) -> Pod:
        """Its output is appended to NAME-INDEX.log."""
        return Pod(self.spec, f"{self.name}-{index}", self.nodes[index], self.volume)

    def move(self, index: int, address: str) -> None:
        """The next pod of this index has another address."""
        node = self.nodes[index]
        for what in (("flush", "dev", node.interface), ("add", f"{address}/24", "dev", node.interface)):
            subprocess.run(["ip", "-n", node.namespace, "address", *what], check=True, capture_output=True)
        self.addresses[index] = address
        self._tell_names()

    def action(self, code: int) -> str | None:
        """What the Job does about an exit code."""
        codes = ((rule["action"], rule["onExitCodes"]["values"]) for rule in self.rules if "onExitCodes" in rule)
        return next((action for action, values in codes if code in values), None)

    def output(self) -> str:
        logs = sorted(self.volume.glob(f"{self.name}-*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def _tell_names(self) -> None:
        """`ip netns exec` puts this in the place of /etc/hosts. Written in place: those inside see the same file."""
        names = [f"{self.name}-{index}" for index in range(len(self.nodes))]
        told = [f"{address} {name}.{self.subdomain}\n" for name, address in zip(names, self.addresses, strict=True)]
        for folder, name, address in zip(self.names, names, self.addresses, strict=True):
            # A pod's own name is in its /etc/hosts.
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(told) + f"{address} {name}\n")


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as pair:
        yield pair
        for host in (pair.first, pair.second):
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
@pytest.mark.skipif(_WHY_NOT is not None, reason=_WHY_NOT or "")
def test_an_evicted_pod_saves_and_is_replaced_and_no_bit_differs(
    corpus: TinyCorpus, tmp_path: Path, hosts: TwoHosts
) -> None:
    evicted = 1  # 0 is where the pods meet
    (tmp_path / "undisturbed").mkdir()
    recipe = tiny_recipe(tmp_path / "tiny.yaml", corpus, max_duration="120ba", save_interval="60ba", eval_loader=None)
    undisturbed = launch(recipe, ranks=2, cwd=tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output

    plan = LaunchPlan(recipe, run_name="tiny", nodes=2, min_nodes=2, gpus_per_node=1, environment={"A": "$(B)"})
    options = KubernetesOptions(image="x", volume_claims=(f"training:{tmp_path}",), grace=120)
    cluster = Cluster(hosts, manifest(plan, options, save_folder="runs/{run_name}/checkpoints"), tmp_path)
    run = tmp_path / "runs" / "tiny"
    pods = [cluster.start(index) for index in (0, 1)]

    def wait_for(happened: Callable[[], bool]) -> float:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < deadline, cluster.output()
            time.sleep(0.05)
        return time.monotonic()

    def reached() -> int:
        assert all(pod.process.poll() is None for pod in pods), cluster.output()
        return max(read_metric(run, LOSS), default=0) if (run / "metrics.jsonl").exists() else 0

    wait_for(lambda: reached() >= 6)
    pods[evicted].evict()
    told = time.monotonic()
    code = pods[evicted].process.wait(cluster.spec["terminationGracePeriodSeconds"])
    gone = time.monotonic()
    assert (code, cluster.action(code)) == (143, "Ignore"), cluster.output()
    stopped = re.search(r"SIGTERM: stopped after step (\d+); saved", cluster.output())
    assert stopped is not None, cluster.output()
    saved = int(stopped[1])
    assert (run / "checkpoints" / f"ep0-ba{saved}").is_dir(), cluster.output()
    cluster.move(evicted, f"10.213.7.1{evicted + 1}")
    pods[evicted] = cluster.start(evicted)
    stepped = wait_for(lambda: reached() > saved)
    assert [pod.process.wait(PATIENCE) for pod in pods] == [0, 0], cluster.output()
    print(f"told -> gone {gone - told:.1f} s, -> stepped {stepped - told:.1f} s")
    assert f"continues after step {saved}" in cluster.output()
    assert read_metric(run, LOSS) == undisturbed.metrics(LOSS)
    assert same_state(run / "checkpoints" / "latest", undisturbed.folder / "checkpoints" / "latest") > 10
