"""A real training as a job of a real SLURM cluster: preempted, requeued, resumed."""

from pathlib import Path

import pytest

from llmtrain.launching.command import Options, launch_command
from llmtrain.launching.slurm import SlurmOptions
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import launch, read_metric
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.slurm import Cluster, missing
from llmtrain.testing.state import same_state

STEPS = 60


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
@pytest.mark.xfail(reason="open: with loader workers, a rank fails at SLURM's SIGTERM instead of saving", strict=False)
@pytest.mark.parametrize("partition", ["low", "grace"])
def test_a_preempted_job_ends_where_an_undisturbed_run_ends(
    partition: str,
    corpus: TinyCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit by bit. `low`: SLURM ends and requeues the job at once; `grace`: it tells the ranks, and we requeue."""
    if why := missing():
        pytest.skip(why)
    (tmp_path / "undisturbed").mkdir()
    recipe = tiny_recipe(
        tmp_path / "tiny.yaml",
        corpus,
        max_duration=f"{STEPS}ba",
        save_interval="20ba",
        eval_interval="20ba",
        console_log_interval="20ba",
        train_loader={
            "name": "text",
            "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
            "num_workers": 1,  # SLURM sends SIGTERM to them, too
        },
    )
    undisturbed = launch(recipe, ranks=2, cwd=tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output

    with Cluster(cpus=2, grace_seconds=60) as cluster:
        for key, value in cluster.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.chdir(tmp_path)
        options = Options(
            scheduler="slurm", gpus_per_node=2, on_cpu=True, slurm=SlurmOptions(partition=partition), max_restarts=0
        )
        assert launch_command(recipe, [], options) == 0
        job = capsys.readouterr().out.strip()
        run = tmp_path / "runs" / "tiny"
        log = run / f"slurm-{job}.out"

        def output() -> str:
            return log.read_text() if log.exists() else ""

        def steps() -> int:
            return max(read_metric(run, "loss/train/total"), default=0) if (run / "metrics.jsonl").exists() else 0

        cluster.wait_until(lambda: steps() >= 6 or "ended" in output(), "step 6", 900, output)
        cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 2", cwd=tmp_path)
        over = ("COMPLETED", "FAILED", "CANCELLED")
        cluster.wait_until(lambda: cluster.job(job).state in over, "the end", 900, output)
        ended = cluster.job(job)
    assert ended.state == "COMPLETED", output()
    assert ended.restarts == 1
    assert "SIGTERM: stopped after step" in output(), output()
    assert "continues after step" in output()
    whole = read_metric(run, "loss/train/total")
    assert whole == undisturbed.metrics("loss/train/total")
    assert same_state(run / "checkpoints" / "latest", undisturbed.folder / "checkpoints" / "latest") > 10
