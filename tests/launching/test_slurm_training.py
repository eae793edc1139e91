"""A real training as a job of a real SLURM cluster: interrupted, requeued, resumed."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.launching.command import Options, launch_command
from llmtrain.launching.slurm import SlurmOptions
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.slurm import Cluster, missing
from llmtrain.testing.state import same_state

LOSS = "loss/train/total"
PATIENCE = 900.0
"""Seconds for ranks to import and train on a busy machine."""


def preempt(cluster: Cluster, job: str, cwd: Path) -> None:
    """A job of two seconds that wants both nodes, and is more urgent."""
    cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 2", cwd=cwd)


def come_near_the_limit(cluster: Cluster, job: str, cwd: Path) -> None:
    """The job's limit is less than two minutes away now; SLURM looks every half a minute."""
    *hours, minutes, _ = map(int, cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").split(":"))
    limit = sum(hours) * 60 + minutes + 2
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
@pytest.mark.parametrize(
    ("partition", "interrupt", "steps"),
    [
        ("low", preempt, 120),  # SLURM ends all processes of the job, and requeues it at once
        ("grace", preempt, 120),  # SLURM tells the ranks, and the script requeues
        ("low", come_near_the_limit, 800),  # SLURM tells the script
    ],
    ids=["preempted", "preempted-with-grace", "time-limit"],
)
def test_an_interrupted_job_ends_where_an_undisturbed_run_ends(
    partition: str,
    interrupt: Callable[[Cluster, str, Path], None],
    steps: int,
    corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit by bit."""
    if why := missing():
        pytest.skip(why)
    (tmp_path / "undisturbed").mkdir()
    recipe = tiny_recipe(
        tmp_path / "tiny.yaml",
        corpus,
        max_duration=f"{steps}ba",
        save_interval=f"{steps // 2}ba",
        eval_interval=f"{steps // 2}ba",
        console_log_interval=f"{steps // 2}ba",
        train_loader={
            "name": "text",
            "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
            "num_workers": 1,  # SLURM sends SIGTERM to them, too
        },
    )
    undisturbed = launch(recipe, ranks=2, cwd=tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output

    with Cluster(cpus=2, grace_seconds=60) as cluster:
        for key, value in {**cluster.environment, "WANDB_MODE": "offline"}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.chdir(tmp_path)
        options = Options(
            scheduler="slurm",
            gpus_per_node=2,
            on_cpu=True,
            slurm=SlurmOptions(partition=partition),
            grace=120,
            max_restarts=0,
        )
        # W&B has a process of its own, which SLURM ends as well.
        assert launch_command(recipe, ["loggers.wandb.project=test"], options) == 0
        job = capsys.readouterr().out.strip()
        run = tmp_path / "runs" / "tiny"
        log = run / f"slurm-{job}.out"

        def output() -> str:
            return log.read_text() if log.exists() else ""

        def reached() -> int:
            return max(read_metric(run, LOSS), default=0) if (run / "metrics.jsonl").exists() else 0

        def wait_for(happened: Callable[[], object], what: str) -> float:
            cluster.wait_until(lambda: bool(happened()), what, PATIENCE, output)
            return time.monotonic()

        wait_for(lambda: reached() >= 6 or "srun" in output(), "step 6")
        interrupt(cluster, job, tmp_path)
        told = time.monotonic()
        saved = wait_for(lambda: "SIGTERM: stopped" in output() or "start 2" in output(), "a save")
        again = wait_for(lambda: "start 2 of this job" in output(), "the second start")
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        stopped = re.search(r"SIGTERM: stopped after step (\d+); saved", output())
        assert stopped is not None, output()
        stepped = wait_for(lambda: reached() > int(stopped[1]), "another step")
        wait_for(lambda: cluster.job(job).state in ("COMPLETED", "FAILED", "CANCELLED"), "the end")
        ended = cluster.job(job)
        print(f"told -> saved {saved - told:.1f} s, -> started {again - told:.1f} s, -> stepped {stepped - told:.1f} s")
        assert ended.state == "COMPLETED", output() + cluster.logs()
        assert ended.restarts == 1
    assert f"continues after step {stopped[1]}" in output()
    assert "\nerror" not in output(), output()
    assert "Traceback" not in output(), output()
    assert read_metric(run, LOSS) == undisturbed.metrics(LOSS)
    assert same_state(run / "checkpoints" / "latest", undisturbed.folder / "checkpoints" / "latest") > 10
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
