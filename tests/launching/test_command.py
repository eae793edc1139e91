"""`llmtrain launch`: what is refused before anything starts, and the commands that it prints."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmtrain.cli import app
from llmtrain.errors import UserError
from llmtrain.launching import command, network, slurm
from llmtrain.launching.command import Options, launch_command
from llmtrain.launching.plan import LaunchPlan
from llmtrain.launching.supervisor import Job, inherited
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.recipe import tiny_recipe

HERE = "127.0.0.1:29511"


@pytest.fixture
def recipe(corpus: TinyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLMTRAIN_TRUST_CODE", raising=False)
    return tiny_recipe(tmp_path / "a recipe.yaml", corpus, run_name="tiny")


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would be supervised."""
    kept: list[Job] = []
    monkeypatch.setattr(command, "supervise", lambda job: kept.append(job) or 0)
    return kept


def printed(recipe: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **options: object) -> list[str]:
    assert launch_command(recipe, overrides, Options(only_print=True, **options)) == 0  # type: ignore[arg-type]
    return capsys.readouterr().out.splitlines()


def test_one_host_is_composers_launcher(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed(recipe, capsys, "max_duration=3ba", "metadata={note: a b}", gpus_per_node=2)
    wanted = ["composer", "-n", "2", "-m", "llmtrain.training.command", str(recipe), "max_duration=3ba"]
    assert shlex.split(line) == [*wanted, "metadata={note: a b}"]


def test_several_hosts_are_torchrun_or_composers_flags(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(recipe, capsys, nodes=2, gpus_per_node=4, rdzv_endpoint="node1:29400")
    torchrun, *composer = [line for line in lines if not line.startswith("#")]
    assert "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node1:29400" in torchrun
    assert "--rdzv-id tiny --max-restarts 3 -m llmtrain.launching.rank" in torchrun
    for rank, line in enumerate(composer):
        flags = f"--world_size 8 --node_rank {rank} --master_addr node1 --master_port 29400"
        assert f"composer -n 4 {flags} -m llmtrain.training.command" in line
    assert len(composer) == 2


def test_elastic_is_a_range_of_hosts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(recipe, capsys, nodes=4, min_nodes=1, gpus_per_node=1, rdzv_endpoint="node1")
    assert "--nnodes 1:4" in lines[1]
    assert "--rdzv-endpoint node1:29500" in lines[1]
    assert not any("composer" in line for line in lines)


def test_the_command_that_runs_knows_this_host(
    recipe: Path, job: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(nodes=4, min_nodes=1, gpus_per_node=1, rdzv_endpoint=HERE, rdzv_conf="join_timeout=5", grace=7)
    assert launch_command(recipe, [], options) == 0
    (one,) = job
    assert one.elastic
    said = capsys.readouterr().err
    assert "--local-addr 127.0.0.1" in said
    assert "--rdzv-conf join_timeout=5,is_host=1" in said
    assert "with 3 hosts, global_train_batch_size 8 cannot be split" in said
    assert one.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "7"
    assert one.environment["LLMTRAIN_VERDICT"] == str(one.verdict)
    assert Path(one.command()[0]).name == "torchrun"


def test_a_supervised_host_cleans_what_an_outer_launch_left(
    recipe: Path, job: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "NODE_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANKED", "1")
    assert launch_command(recipe, [], Options(gpus_per_node=1)) == 0
    environment = job[0].environment
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "NODE_RANK"} & environment.keys()
    assert environment["RANKED"] == "1"
    assert inherited({"A": "b"})["A"] == "b"


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({}, ["max_duraton=3ba"], "max_duraton"),
        ({"gpus_per_node": 3}, [], "cannot be split over 3 ranks"),
        ({"nodes": 2, "gpus_per_node": 1}, [], "--rdzv-endpoint"),
        ({"nodes": 2, "gpus_per_node": 1, "rdzv_endpoint": "node1:port"}, [], "is not HOST:PORT"),
        ({"nodes": 2, "scheduler": "local"}, [], "local is for one host"),
        ({"nodes": 2, "min_nodes": 3, "rdzv_endpoint": HERE}, [], "--min-nodes: 3 is more"),
        ({"nodes": 2, "node_rank": 2, "rdzv_endpoint": HERE}, [], "--node-rank: 2"),
        ({"nodes": 2, "node_rank": 0, "min_nodes": 1, "rdzv_endpoint": HERE}, [], "needs all of them"),
        ({"gpus_per_node": 1, "variables": ["RANK=3"]}, [], "--env: RANK is the launcher's to set"),
        ({"scheduler": "lsf"}, [], "'lsf' is none of local, torchrun, slurm, kubernetes"),
        ({"gpus_per_node": 1}, ["code_paths=[evil.py]"], "--trust-code"),
        ({"gpus_per_node": 1}, ["save_overwrite=true"], "begins the run anew at each restart.*--max-restarts 0"),
        ({"gpus_per_node": 1, "scheduler": "slurm", "max_restarts": 0}, ["save_overwrite=true"], "at each restart"),
    ],
)
def test_mistakes_end_before_anything_starts(
    options: dict[str, object], overrides: list[str], message: str, recipe: Path, job: list[Job]
) -> None:
    with pytest.raises(UserError, match=message):
        launch_command(recipe, overrides, Options(**options))  # type: ignore[arg-type]
    assert not job


def test_torchrun_on_one_host_takes_any_port(recipe: Path, job: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    (_, line) = printed(recipe, capsys, scheduler="torchrun", gpus_per_node=2)
    assert "torchrun --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0" in line
    assert launch_command(recipe, [], Options(scheduler="torchrun", gpus_per_node=2)) == 0
    assert "--local-addr 127.0.0.1" in capsys.readouterr().err
    assert job[0].port is None


def test_a_launch_by_mistake_leaves_the_verdict_of_another_alone(recipe: Path, job: list[Job]) -> None:
    """Its ranks find that the run is going on, which is a user's mistake: no verdict about the run."""
    for endpoint in (HERE, "127.0.0.1:29512"):
        launch_command(recipe, [], Options(nodes=2, gpus_per_node=1, rdzv_endpoint=endpoint))
    assert job[0].verdict != job[1].verdict
    assert [one.port for one in job] == [29511, 29512]


def test_secrets_are_not_shown(recipe: Path, job: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    secret = {"overrides": ["metadata={my: {password: planted-block}}"], "variables": ("MY_PASS=planted-variable",)}
    for options in ({}, {"nodes": 2, "rdzv_endpoint": HERE}, {"nodes": 2, "rdzv_endpoint": HERE, "node_rank": 0}):
        for only_print in (False, True):
            given = Options(gpus_per_node=1, only_print=only_print, variables=secret["variables"], **options)  # type: ignore[arg-type]
            assert launch_command(recipe, secret["overrides"], given) == 0
    said = "".join(capsys.readouterr())
    assert said.count("MY_PASS='***'") >= 6
    assert "planted" not in said
    assert job[0].environment["MY_PASS"] == "planted-variable"
    for scheduler in ("slurm", "kubernetes"):
        with pytest.raises(UserError, match="a secret would stand in a file") as caught:
            printed(recipe, capsys, *secret["overrides"], scheduler=scheduler, gpus_per_node=1)
        assert "planted" not in str(caught.value)


def test_a_hosts_own_name_that_leads_to_loopback_is_not_told_to_the_others(
    recipe: Path, job: list[Job], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian writes it into /etc/hosts: `127.0.1.1 node1`."""
    theirs = network.socket.getaddrinfo

    def lookup(host: str, *arguments: object, **named: object) -> object:
        return theirs("127.0.1.1" if host == "node1" else host, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(network.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(network, "_own_addresses", lambda: {"127.0.0.1": "lo", "10.9.8.7": "eth7"})
    monkeypatch.setattr(network, "_ELSEWHERE", "127.0.0.9")  # no way leads out of here
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert launch_command(recipe, [], Options(nodes=2, gpus_per_node=1, rdzv_endpoint="node1:29511")) == 0
    said = capsys.readouterr().err
    assert "--local-addr 10.9.8.7" in said
    assert "is_host=1" in said
    assert job[0].environment["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.setattr(network, "_own_addresses", lambda: {"127.0.0.1": "lo", "10.9.8.7": "eth7", "10.1.1.1": "eth1"})
    assert network.address_for_others("node1", 1) is None  # nobody knows which of them
    assert network.address_for_others("127.0.0.1", 1) == "127.0.0.1"  # hosts that are one machine, as it was asked


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 exec "$@"
"""


def test_no_word_of_the_user_becomes_a_command_of_the_batch_script(corpus: TinyCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "it's; touch mark $(touch mark) `touch mark`\n#SBATCH --wrap\n \"'"
    folder.mkdir()
    recipe = tiny_recipe(folder / "a 'recipe'.yaml", corpus, run_name="a $(touch mark) 'run'; touch mark #")
    overrides = ("metadata={note: \"'; touch mark; '\"}", "metadata.b=a\n$(touch mark)\nb")
    plan = LaunchPlan(recipe, overrides, "a $(touch mark) 'run'; touch mark #", environment={"A": "'; touch mark; '"})
    tools = tmp_path / "tools"
    tools.mkdir()
    show = "import json, os, sys; json.dump([sys.argv[3:], os.environ['A']], open(os.environ['SEEN'], 'w'))"
    python = tools / "a python"
    bodies = {"a python": f"#!{sys.executable}\n{show}", "srun": SRUN, "scontrol": "#!/bin/sh\necho node1\n"}
    for name, body in bodies.items():
        (tools / name).write_text(body)
        (tools / name).chmod(0o755)
    text = slurm.script(plan, slurm.SlurmOptions(), python=str(python))
    assert "--wrap" not in text.partition("\nset -u\n")[0]  # sbatch reads no further than to the first command
    (tmp_path / "script.sh").write_text(text)
    (tmp_path / "runs" / plan.run_name).mkdir(parents=True)
    variables = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    variables |= {"PATH": f"{tools}:/usr/bin:/bin", "SEEN": str(tmp_path / "seen")}
    done = subprocess.run(["bash", "script.sh"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "seen").read_text()) == [[str(recipe), *overrides], "'; touch mark; '"]
    assert not list(tmp_path.rglob("mark"))


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [("node1:29400", "node1", 29400), ("node1", "node1", 29500), ("[fd00::1]:7", "[fd00::1]", 7)],
)
def test_endpoints(given: str, host: str, port: int) -> None:
    assert LaunchPlan(Path("r.yaml"), rdzv_endpoint=given).endpoint() == (host, port)


def test_the_commands_of_the_docs_are_good_ones(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    text = (repository / "docs" / "launching.md").read_text().replace("\\\n", " ")
    lines = [
        line.partition("#")[0].partition("|")[0] for line in text.splitlines() if line.startswith("llmtrain launch")
    ]
    assert len(lines) >= 6
    for line in lines:
        done = CliRunner().invoke(app, [*shlex.split(line)[1:], "--print"])
        assert done.exit_code == 0, (line, done.exception)
        assert "torchrun" in done.stdout or "composer" in done.stdout or "llmtrain" in done.stdout


def test_printing_imports_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmtrain.launching.command import *;"
        f"launch_command(Path({str(recipe)!r}), [], Options(gpus_per_node=1, only_print=True));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'composer', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
