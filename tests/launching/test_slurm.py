"""Our batch script in a real SLURM cluster of two nodes on this machine, with ranks that only pretend to train.

One job that is preempted stays in the gate; real ranks train in test_slurm_training.py.
"""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.launching.plan import LaunchPlan
from llmtrain.launching.slurm import SlurmOptions, script, submit
from llmtrain.testing.slurm import Cluster, missing

PLAN = LaunchPlan(Path("x.yaml"), ("a=b c",), run_name="x", nodes=2, min_nodes=2, gpus_per_node=1, on_gpu=False)

# Says who it is, and does what the file `do-START` says for its rank and its start of all starts.
RANK = r"""#!/bin/bash
exec 2>&1
trap 'echo "rank $RANK got TERM"; sleep 1; echo "rank $RANK saved"; exit 143' TERM
start=$(cat "start.$RANK" 2>/dev/null || echo 0)
echo $((start + 1)) >"start.$RANK"
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE on node $NODE_RANK, start $start, $MASTER_ADDR, $*"
echo "X=${X:-}"
todo=$(cat "do-$start-$RANK" "do-$start" 2>/dev/null | head -n 1)
case $todo in
    exit*) exit "${todo#exit }" ;;
    kill) kill -9 $$ ;;
    pause) sleep 30 ;;
    wait) for _ in $(seq 600); do sleep 0.1; done ;;
    hang) trap '' TERM; for _ in $(seq 600); do sleep 0.1; done ;;
esac
echo "rank $RANK finished"
"""


def text(**changes: object) -> str:
    options = SlurmOptions(**changes)  # type: ignore[arg-type]
    return script(PLAN, options, python="/opt/python")


def test_the_script_is_a_script(tmp_path: Path) -> None:
    path = tmp_path / "x.sh"
    path.write_text(text(time="24:00:00", sbatch=("cpus-per-task=12", "comment=it's # one", "exclusive")))
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_what_is_asked_of_slurm() -> None:
    lines = text(
        time="1-12", partition="gpu", account="me", qos="high", grace=300, sbatch=("job-name=other", "mem=0")
    ).splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=1", "time=1-12", "partition=gpu", "account=me", "qos=high"} <= set(asked)
    assert {"requeue", "signal=B:USR1@300", "open-mode=append", "output=runs/x/slurm-%j.out"} <= set(asked)
    assert "job-name=other" in asked  # replaces ours
    assert "job-name=x" not in asked
    assert "mem=0" in asked
    assert not any(line.startswith("gpus-per-node") for line in asked)
    assert "TRAIN=(/opt/python -m llmtrain.training.command x.yaml 'a=b c')" in lines
    gpu = script(replace(PLAN, on_gpu=True, gpus_per_node=8, min_nodes=1), SlurmOptions())
    assert "#SBATCH --gpus-per-node=8\n" in gpu
    assert "#SBATCH --nodes=1-2\n" in gpu


def test_a_percent_sign_is_no_pattern_of_sbatch() -> None:
    found = script(replace(PLAN, run_name="100%u"), SlurmOptions())
    assert "#SBATCH --output=runs/100%%u/slurm-%j.out\n" in found
    assert "RUN=runs/100%u\n" in found


@pytest.mark.parametrize("name", ["RUN", "MARKS", "TRAIN", "GRACE", "RANK_SCRIPT"])
def test_variables_of_the_script_are_its_own(name: str) -> None:
    """`--env RUN=/tmp` would have it remove folders there."""
    with pytest.raises(UserError, match=f"--env {name}: the script has"):
        script(replace(PLAN, environment={name: "x"}), SlurmOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "a day"}, "--time: 'a day'"),
        ({"sbatch": ("nodes=3",)}, "use --nodes"),
        ({"sbatch": ("signal=TERM@5",)}, "use --grace"),
        ({"sbatch": ("export=NONE",)}, "use --env"),
        ({"sbatch": ("comment=a\n#SBATCH --uid=0",)}, "cannot stand in a line"),
        ({"sbatch": ("what is this",)}, "is not KEY=VALUE"),
        ({"partition": "a\nrm -rf"}, "cannot stand in a line"),
        ({"sbatch": ("comment=a\\b",)}, "cannot stand in a line"),  # sbatch would drop it
        ({"grace": 0}, "--grace"),
        ({"max_requeues": -1}, "--max-requeues"),
    ],
)
def test_options_that_would_break_it_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        text(**options)


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        submit(text(), PLAN)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    with Cluster(kill_wait=4, grace_seconds=20) as running:
        yield running


class Submitted:
    """A job of the script above, whose ranks do what they are told.

    Args:
        cluster: where it runs.
        cwd: its folder.
        todo: names of files and what they hold: see RANK.
        programs: folder of programs that the job finds before SLURM's.
        options: for SLURM.
    """

    def __init__(
        self,
        cluster: Cluster,
        cwd: Path,
        todo: dict[str, str],
        monkeypatch: pytest.MonkeyPatch,
        plan: LaunchPlan = PLAN,
        programs: Path | None = None,
        **options: object,
    ) -> None:
        self.cluster, self.cwd = cluster, cwd
        rank = cwd / "rank"
        rank.write_text(RANK)
        rank.chmod(rank.stat().st_mode | stat.S_IXUSR)
        for name, what in todo.items():
            (cwd / name).write_text(what)
        for key, value in cluster.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.chdir(cwd)
        plan = replace(plan, environment={"X": "it's $HOME"}, max_restarts=int(str(options.pop("max_restarts", 3))))
        with monkeypatch.context() as shell:
            if programs is not None:
                shell.setenv("PATH", f"{programs}:{cluster.environment['PATH']}")
            self.id = submit(script(plan, SlurmOptions(**options), python=str(rank)), plan)  # type: ignore[arg-type]

    def output(self) -> str:
        path = self.cwd / "runs" / "x" / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, what: str, times: int = 1, timeout: float = 30) -> None:
        self.cluster.wait_until(lambda: self.output().count(what) >= times, what, timeout, self.output)

    def end(self, timeout: float = 60) -> str:
        """The job's last state; it has left its nodes."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.cluster.wait_until(lambda: self.cluster.job(self.id).state in over, "the job's end", timeout, self.output)
        return self.cluster.job(self.id).state

    def marks(self) -> list[Path]:
        return list((self.cwd / "runs" / "x").glob(".slurm-*"))


def preempt(cluster: Cluster, job: Submitted) -> None:
    """A job of two seconds that wants both nodes, and is more urgent."""
    cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2", cwd=job.cwd)


def test_ranks_are_told_who_they_are(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Submitted(cluster, tmp_path, {}, monkeypatch)
    assert job.end() == "COMPLETED", job.output()
    for rank in (0, 1):
        assert f"rank {rank} of 2, 0 of 1 on node {rank}, start 0, {cluster.nodes[0]}, " in job.output()
    assert "-m llmtrain.training.command x.yaml a=b c\n" in job.output()
    assert "X=it's $HOME\n" in job.output()
    assert job.output().endswith("slurm       finished\n")
    assert job.marks() == []


@pytest.mark.long
def test_an_elastic_job_takes_what_there_is(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = ("sbatch", "-N1", "--exclusive", "-w", cluster.nodes[1], "-o", "/dev/null", "--wrap=sleep 4")
    cluster.run(*busy, cwd=tmp_path)
    for nodes in (1, 2):
        (tmp_path / str(nodes)).mkdir()
        job = Submitted(cluster, tmp_path / str(nodes), {}, monkeypatch, replace(PLAN, min_nodes=1, gpus_per_node=2))
        assert job.end() == "COMPLETED", job.output()
        ranks = 2 * nodes
        for rank in range(ranks):
            assert f"rank {rank} of {ranks}, {rank % 2} of 2 on node {rank // 2}, " in job.output()
        cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), "an empty queue", 30, job.output)


@pytest.mark.slow
@pytest.mark.long
def test_preempted_at_once_it_saves_and_comes_back(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Submitted(cluster, tmp_path, {"do-0": "wait"}, monkeypatch, partition="low")
    job.wait_for("start 0", 2)
    preempt(cluster, job)
    assert job.end() == "COMPLETED", job.output()
    assert job.output().count(" saved\n") == 2
    assert "start 2 of this job" in job.output()
    assert cluster.job(job.id).restarts == 1


@pytest.mark.slow
def test_preempted_with_a_grace_period_it_comes_back(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM tells the ranks alone then, and would take a job that ends of it for a failed one."""
    job = Submitted(cluster, tmp_path, {"do-0": "wait"}, monkeypatch, partition="grace")
    job.wait_for("start 0", 2)
    preempt(cluster, job)
    assert job.end() == "COMPLETED", job.output()
    assert job.output().count(" saved\n") == 2
    assert "SIGTERM; the ranks have stopped; back to the queue" in job.output()
    assert cluster.job(job.id).restarts == 1


@pytest.mark.slow
@pytest.mark.long
def test_near_the_time_limit_it_saves_and_comes_back(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SLURM looks for such signals every half a minute; a minute before the end of one minute is at once.
    job = Submitted(cluster, tmp_path, {"do-0": "wait", "do-1": "pause"}, monkeypatch, time="1", grace=60)
    job.wait_for("start 2 of this job", timeout=90)
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    # The first start would have requeued the job 20 s after the signal. It is over, and this one is not to be ended.
    assert job.end(90) == "COMPLETED", job.output()
    assert job.output().count(" saved\n") == 2
    assert "the time limit is near; the ranks have stopped; back to the queue" in job.output()
    assert cluster.job(job.id).restarts == 1


@pytest.mark.slow
@pytest.mark.long
def test_a_crash_is_restarted_in_the_same_job(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo = {"do-0-1": "exit 1", "do-0-0": "wait", "do-1-1": "kill", "do-1-0": "wait"}
    job = Submitted(cluster, tmp_path, todo, monkeypatch)
    assert job.end() == "COMPLETED", job.output()
    assert "srun ended with exit code 1; restart 1 of 3" in job.output()
    assert "srun ended with exit code 137; restart 2 of 3" in job.output()
    assert cluster.job(job.id).restarts == 0


@pytest.mark.long
def test_restarts_are_bounded(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = {"do-0": "exit 75", "do-1": "exit 75"}
    job = Submitted(cluster, tmp_path, todo, monkeypatch, max_restarts=1)
    assert job.end() == "FAILED"
    assert cluster.job(job.id).exit_code == 75
    assert "given up after 1 restarts" in job.output()
    assert job.output().count("rank 0 of 2") == 2


@pytest.mark.long
@pytest.mark.parametrize("code", [2, 3])
def test_pointless_codes_end_the_job(
    code: int, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another rank has to be killed, whose code is higher and so is srun's."""
    job = Submitted(cluster, tmp_path, {"do-0-1": f"exit {code}", "do-0-0": "hang"}, monkeypatch)
    assert job.end() == "FAILED"
    assert cluster.job(job.id).exit_code == code
    assert job.output().count("rank 0 of 2") == 1
    assert job.marks() == []


@pytest.mark.slow
@pytest.mark.long
def test_requeues_are_bounded(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Submitted(cluster, tmp_path, {"do-0": "wait", "do-1": "wait"}, monkeypatch, max_requeues=1)
    for start in (0, 1):
        job.wait_for(f"start {start}", 2)
        cluster.run("scancel", "--signal=TERM", job.id)
    assert job.end() == "FAILED"
    assert cluster.job(job.id).exit_code == 143
    assert "requeued 1 times, which is the limit" in job.output()


@pytest.mark.slow
@pytest.mark.long
def test_a_busy_slurm_is_asked_again(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job's own requests each fails once; a job that believed it would not come back."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "scontrol"):
        real = shutil.which(name, path=cluster.environment["PATH"])
        (programs / name).write_text(
            "#!/bin/bash\n"
            f'[ "$1 $2" = "show hostnames" ] || {{ mkdir "{programs}/asked-{name}" 2>/dev/null && exit 1; }}\n'
            f'exec {real} "$@"\n'
        )
        (programs / name).chmod(0o755)
    job = Submitted(cluster, tmp_path, {"do-0": "wait"}, monkeypatch, programs=programs)
    job.wait_for("start 0", 2)
    cluster.run("scancel", "--signal=TERM", job.id)
    assert job.end() == "COMPLETED", job.output()
    assert cluster.job(job.id).restarts == 1
    assert {path.name for path in programs.glob("asked-*")} == {"asked-squeue", "asked-scontrol"}


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Submitted(cluster, tmp_path, {"do-0": "wait"}, monkeypatch)
    job.wait_for("start 0", 2)
    cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED"
    job.wait_for("SLURM has decided what follows")
    assert job.output().count(" saved\n") == 2
    assert job.output().count("rank 0 of 2") == 1
