"""A store that fails while checkpoints are sent to it: training goes on, and nothing that was good is lost."""

import random
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.remote import CuttingProxy

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]


@pytest.fixture
def recipe(s3: str, corpus: TinyCorpus, tmp_path: Path) -> tuple[Path, dict[str, str], Any]:
    client: Any = boto3.client("s3", "us-east-1", endpoint_url=s3, aws_access_key_id="me", aws_secret_access_key="x")
    name = f"bucket-{random.getrandbits(40):x}"
    client.create_bucket(Bucket=name)
    environment = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    path = tiny_recipe(
        tmp_path / "x.yaml",
        corpus,
        save_folder=f"s3://{name}/{{run_name}}",
        save_num_checkpoints_to_keep=1,
        max_duration="16ba",
        eval_interval=0,
        eval_loader=None,
    )

    def complete() -> set[str]:
        found = client.list_objects_v2(Bucket=name).get("Contents", [])
        return {one["Key"].split("/")[1] for one in found if one["Key"].endswith("/manifest.json")}

    return path, environment, complete


def line_with(run: Run, text: str) -> str:
    return next(line for line in run.output().splitlines() if text in line)


def test_the_store_goes_down_and_comes_back(recipe: Any, s3: str, tmp_path: Path) -> None:
    path, environment, complete = recipe
    with CuttingProxy(int(s3.rpartition(":")[2]), every=0, after=0) as proxy:
        run = Run(path, ranks=2, cwd=tmp_path, environment={**environment, "S3_ENDPOINT_URL": proxy.url})
        run.wait_for("ep0-ba4 -> s3://")
        proxy.down()
        watch = Stopwatch()
        run.wait_for(" fails: ")
        detected = watch.seconds()
        step = max((line.split()[2] for line in run.output().splitlines() if line.startswith("train ")), key=int)
        if int(step) < 14:
            run.wait_for(f"step {int(step) + 2} ")  # training goes on
        time.sleep(3)
        assert complete() == {"ep0-ba4"}  # the last good one
        proxy.every = 0
        run.wait_for("works again")
        recovered = watch.seconds()
        ended = run.wait()
    assert ended.code == 0, ended.output
    assert complete() == {"ep0-ba16"}
    assert (tmp_path / "runs/x/checkpoints/latest").resolve().name == "ep0-ba16"
    assert manifest.verify(tmp_path / "runs/x/checkpoints/ep0-ba16") == []
    message = line_with(run, " fails: ")
    assert "Training goes on" in message
    observe(
        "store of checkpoints down and back",
        "training goes on, uploads are tried again until they arrive",
        run=run.folder,
        detected=detected,
        recovered=recovered,
        message=message,
    )


@pytest.mark.long
def test_the_store_stays_away(recipe: Any, s3: str, tmp_path: Path) -> None:
    path, environment, complete = recipe
    environment["LLMTRAIN_STORAGE_ATTEMPTS"] = "3"
    with CuttingProxy(int(s3.rpartition(":")[2]), every=0, after=0) as proxy:
        run = Run(path, ranks=2, cwd=tmp_path, environment={**environment, "S3_ENDPOINT_URL": proxy.url})
        run.wait_for("ep0-ba4 -> s3://")
        proxy.down()
        watch = Stopwatch()
        ended = run.wait()
    assert ended.codes == (1, 1), ended.output
    message = line_with(run, "did not arrive in s3://")
    assert "ep0-ba16" in message
    assert "runs/x/checkpoints" in message
    assert complete() == {"ep0-ba4"}
    observe(
        "store of checkpoints stays away",
        "the run is trained to its end, names what did not arrive, exits with 1; the same command sends it",
        run=run.folder,
        detected=watch.seconds(),
        recovered=None,
        message=message,
    )
    again = launch(path, ranks=2, cwd=tmp_path, environment={**environment, "S3_ENDPOINT_URL": s3})
    assert again.code == 0, again.output
    assert "complete at step 16" in again.output
    assert "ep0-ba16 -> s3://" in again.output
    assert complete() == {"ep0-ba16"}


@pytest.mark.long
def test_the_store_is_away_at_the_start(recipe: Any, s3: str, tmp_path: Path) -> None:
    path, environment, complete = recipe
    with CuttingProxy(int(s3.rpartition(":")[2]), every=1, after=1) as proxy:
        away = {**environment, "S3_ENDPOINT_URL": proxy.url, "LLMTRAIN_STORAGE_ATTEMPTS": "2"}
        started = Run(path, ranks=2, cwd=tmp_path, environment=away)
        started.wait_for("importing torch")
        watch = Stopwatch()
        run = started.wait()
        assert set(run.codes) == {2}, run.output
        message = next(line for line in run.output.splitlines() if "does not answer" in line)
        observe(
            "store of checkpoints away at the start",
            "one message before the first step; a warning where a checkpoint is on this machine",
            run=run.folder,
            detected=watch.seconds(),
            recovered=None,
            message=message,
        )
        here = ["save_folder=runs/{run_name}/checkpoints", "max_duration=4ba"]
        assert launch(path, here, ranks=2, cwd=tmp_path).code == 0
        run = launch(path, ["max_duration=8ba"], ranks=2, cwd=tmp_path, environment=away)
        assert "warning: save_folder: s3://" in run.output
        assert "continues after step 4" in run.output
        assert run.codes == (1, 1), run.output
    run = launch(path, ["max_duration=8ba"], ranks=2, cwd=tmp_path, environment={**environment, "S3_ENDPOINT_URL": s3})
    assert run.code == 0, run.output
    assert complete() == {"ep0-ba8"}
