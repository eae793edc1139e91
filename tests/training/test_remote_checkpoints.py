"""`save_folder: s3://...` in real runs of two ranks: what a user relies on when the machine is another one."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import boto3
import pytest

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.ranks import run_ranks
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"


class Bucket:
    """Of the endpoint that the environment names."""

    def __init__(self, url: str) -> None:
        self.environment = {
            "AWS_ACCESS_KEY_ID": "mine",
            "AWS_SECRET_ACCESS_KEY": "very-secret-key",
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_ENDPOINT_URL": url,
        }
        self.client: Any = boto3.client(
            "s3", "us-east-1", endpoint_url=url, aws_access_key_id="mine", aws_secret_access_key="very-secret-key"
        )
        self.name = f"bucket-{random.getrandbits(40):x}"
        self.client.create_bucket(Bucket=self.name)

    def keys(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])
        return [one["Key"] for one in found]

    def complete(self, run: str) -> list[str]:
        keys = self.keys(f"{run}/")
        return sorted((key.split("/")[1] for key in keys if key.endswith("/manifest.json")), key=len)

    def flip(self, key: str) -> None:
        content = bytearray(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())
        content[len(content) // 2] ^= 1
        self.client.put_object(Bucket=self.name, Key=key, Body=bytes(content))


@pytest.fixture(scope="module")
def bucket(s3: str) -> Bucket:
    return Bucket(s3)


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    return tiny_recipe(
        folder / "x.yaml",
        corpus,
        save_folder=f"s3://{bucket.name}/{{run_name}}",
        save_num_checkpoints_to_keep=2,
        eval_interval=0,
        eval_loader=None,
    )


def test_a_new_machine_goes_on_where_the_old_one_was(recipe: Path, bucket: Bucket, tmp_path: Path) -> None:
    old, new, whole = tmp_path / "old", tmp_path / "new", tmp_path / "whole"
    for folder in (old, new, whole):
        folder.mkdir()
    undisturbed = launch(recipe, ["save_folder=runs/{run_name}/checkpoints"], ranks=2, cwd=whole)
    assert undisturbed.code == 0, undisturbed.output

    run = Run(recipe, ranks=2, cwd=old, environment=bucket.environment)
    run.wait_for("step 9 ")
    run.send(signal.SIGTERM, ranks=[1])
    stopped = run.wait()
    assert stopped.codes == (143, 143), stopped.output
    newest = next(path.resolve().name for path in [old / "runs/x/checkpoints/latest"])
    assert f"{newest} -> s3://{bucket.name}/x" in stopped.output
    assert len(bucket.complete("x")) == 2
    assert newest in bucket.complete("x")
    assert "very-secret-key" not in stopped.output
    assert json.loads(bucket.client.get_object(Bucket=bucket.name, Key="x/latest.json")["Body"].read())

    bucket.flip(f"x/{newest}/__1_0.distcp")
    again = launch(recipe, ranks=2, cwd=new, environment=bucket.environment)
    assert again.code == 0, again.output
    assert (
        f"checkpoint {newest} is refused: in s3://{bucket.name}/x: {newest}/__1_0.distcp: hash differs" in again.output
    )
    assert "fetched     ep0-ba8 from s3://" in again.output
    assert "continues after step 8" in again.output
    assert bucket.complete("x") == ["ep0-ba8", "ep0-ba12"] or bucket.complete("x") == ["ep0-ba12", "ep0-ba8"]
    losses = undisturbed.metrics(LOSS)
    assert again.metrics(LOSS) == {step: loss for step, loss in losses.items() if step >= 8}
    same_state(whole / "runs/x/checkpoints/ep0-ba12", new / "runs/x/checkpoints/ep0-ba12")

    # All of it again: the run is complete, here and on the first machine, where that is found out.
    assert "complete at step 12" in launch(recipe, ranks=2, cwd=new, environment=bucket.environment).output
    third = launch(recipe, ranks=2, cwd=old, environment=bucket.environment)
    assert third.code == 0, third.output
    assert "fetched     ep0-ba12" in third.output
    assert "complete at step 12" in third.output


def test_what_is_wrong_with_the_place_is_said_before_the_first_step(
    recipe: Path, bucket: Bucket, tmp_path: Path
) -> None:
    environment = bucket.environment
    for folder, message in (
        ("s3://no-such-bucket-here/x", "save_folder: s3://no-such-bucket-here/x: there is no such bucket or folder"),
        ("hf://me/model", "save_folder: hf://me/model"),
    ):
        run = launch(recipe, [f"save_folder={folder}"], ranks=2, cwd=tmp_path, environment=environment)
        assert set(run.codes) == {2}
        assert run.output.count("\nerror: ") == 1, run.output
        assert message in run.output


def test_each_node_fetches_for_itself_where_none_sees_the_others_disk(bucket: Bucket, tmp_path: Path) -> None:
    sent = tmp_path / "sent/ep0-ba4"
    sent.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp"):
        (sent / name).write_bytes(random.randbytes(3000))
    entries = {file.name: manifest.file_entry(file) for file in sent.iterdir()}
    manifest.write(sent, kind="sharded", step=4, tokens=0, files=entries, recipe={}, tokenizer_fingerprint=None)
    for file in sent.iterdir():
        bucket.client.upload_file(str(file), bucket.name, f"nodes/ep0-ba4/{file.name}")
    found = run_ranks(_fetch, 2, str(tmp_path), f"s3://{bucket.name}/nodes", bucket.environment, True)
    assert found == [([], ["ep0-ba4"])] * 2
    found = run_ranks(_fetch, 2, str(tmp_path / "shared"), f"s3://{bucket.name}/nodes", bucket.environment, False)
    assert found == [([], ["ep0-ba4"])] * 2
    bucket.flip("nodes/ep0-ba4/__0_0.distcp")
    found = run_ranks(_fetch, 2, str(tmp_path / "again"), f"s3://{bucket.name}/nodes", bucket.environment, True)
    assert "hash differs" in found[0][0][0]
    assert found[0] == found[1]
    assert found[0][1] == []


def _fetch(folder: str, url: str, environment: dict[str, str], apart: bool) -> tuple[list[str], list[str]]:
    """On a rank that is a node of its own, with a disk of its own."""
    import os

    from composer.utils import dist

    from llmtrain.checkpoint.remote import RemoteFolder
    from llmtrain.training.remote_start import fetch_together

    os.environ.update(environment)
    if apart:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", NODE_RANK=str(dist.get_global_rank()))
    place = Path(folder) / (f"node{dist.get_global_rank()}" if apart else "all")
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    remote = RemoteFolder(url)
    checkpoints = Path("runs/x/checkpoints")
    problems = fetch_together(remote, remote.checkpoint("ep0-ba4"), checkpoints)
    dist.barrier()
    assert problems or not manifest.verify(checkpoints / "ep0-ba4")
    return problems, sorted(path.name for path in checkpoints.iterdir())


@pytest.mark.long
def test_load_path_in_a_store_is_verified(recipe: Path, corpus: TinyCorpus, bucket: Bucket, tmp_path: Path) -> None:
    environment = {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = launch(recipe, ["run_name=y", "max_duration=4ba"], ranks=2, cwd=tmp_path, environment=environment)
    assert first.code == 0, first.output
    start = [f"load_path=s3://{bucket.name}/y", "max_duration=6ba", "save_folder=null"]
    second = launch(recipe, ["run_name=z", *start], ranks=2, cwd=tmp_path, environment=environment)
    assert second.code == 0, second.output
    assert "continues after step 4" in second.output
    bucket.flip("y/ep0-ba4/__0_0.distcp")
    kept = next((tmp_path / "cache").rglob("ep0-ba4"))
    kept.rename(kept.with_name("away"))
    third = launch(recipe, ["run_name=w", *start], ranks=2, cwd=tmp_path, environment=environment)
    assert third.code == 2
    assert "__0_0.distcp: hash differs" in third.output
    assert "holds no sound checkpoint" in third.output
