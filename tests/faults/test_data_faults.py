"""Data that cannot be had or read in the middle of an epoch: the same numbers after a while, or one message."""

import random
import re
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from streaming.base.format.mds.reader import MDSReader

from llmtrain.checkpoint import manifest
from llmtrain.prep.mds import ShardWriter
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import Run, launch
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.remote import CuttingProxy

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"
ROWS, LENGTH = 160, 64


@pytest.fixture(scope="module")
def shards(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows in 40 small shards, uncompressed."""
    import json

    infos = json.loads((corpus.train / "index.json").read_text())["shards"]
    rows: list[Any] = []
    for info in infos:
        reader = MDSReader.from_json(str(corpus.train), "", info)
        _decompressed(corpus.train, info)
        rows += [reader[i]["tokens"] for i in range(len(reader))]
    folder = tmp_path_factory.mktemp("shards") / "train"
    taken = np.stack(rows[:ROWS])
    with ShardWriter(folder, seq_len=LENGTH, dtype=taken.dtype, compression=None, size_limit=900) as writer:
        writer.write(taken)
    assert len(list(folder.glob("shard.*"))) >= 30
    return folder


def _decompressed(folder: Path, info: dict[str, Any]) -> None:
    from streaming.base.compression import decompress

    raw = folder / info["raw_data"]["basename"]
    if not raw.exists():
        raw.write_bytes(decompress(info["compression"], (folder / info["zip_data"]["basename"]).read_bytes()))


@pytest.fixture
def made(corpus: TinyCorpus, shards: Path, s3: str, tmp_path: Path) -> Any:
    """A recipe that streams the shards from a bucket, in their order."""
    client: Any = boto3.client("s3", "us-east-1", endpoint_url=s3, aws_access_key_id="me", aws_secret_access_key="x")
    name = f"bucket-{random.getrandbits(40):x}"
    client.create_bucket(Bucket=name)
    for file in shards.iterdir():
        client.upload_file(str(file), name, f"books/train/{file.name}")

    def recipe(remote: str | None, local: str, workers: int) -> Path:
        dataset = {"local": local, "shuffle": False, "num_canonical_nodes": 2, "predownload": 4}
        return tiny_recipe(
            tmp_path / "x.yaml",
            corpus,
            train_loader={
                "name": "text",
                "num_workers": workers,
                "dataset": {**dataset, **({"remote": remote} if remote else {})},
            },
            max_duration="16ba",
            eval_interval=0,
            eval_loader=None,
            save_folder="runs/{run_name}/checkpoints",
        )

    environment = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    return recipe, f"s3://{name}/books/train", environment, client, name


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_the_store_goes_down_for_a_while(made: Any, shards: Path, s3: str, tmp_path: Path, workers: int) -> None:
    recipe, url, environment, _, _ = made
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    undisturbed = launch(recipe(None, str(shards), workers), ranks=2, cwd=tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.output
    with CuttingProxy(int(s3.rpartition(":")[2]), every=0, after=0) as proxy:
        path = recipe(url, str(tmp_path / "cache"), workers)
        run = Run(path, ranks=2, cwd=tmp_path / "cut", environment={**environment, "S3_ENDPOINT_URL": proxy.url})
        run.wait_for("step 2 ")
        proxy.down()
        watch = Stopwatch()
        run.wait_for("; attempt 2 of 6")
        detected = watch.seconds()
        time.sleep(max(0.0, 10 - watch.seconds()))
        before = steps(run)
        proxy.every = 0
        run.wait_for(f"step {before + 1} ")
        recovered = watch.seconds()
        ended = run.wait()
    assert ended.code == 0, ended.output
    assert ended.metrics(LOSS) == undisturbed.metrics(LOSS)
    message = next(line for line in ended.output.splitlines() if "; attempt 2 of 6" in line)
    assert "shard.0" in message
    observe(
        f"store of data down for ten seconds, num_workers {workers}",
        "shards are fetched again until they come; the same losses",
        run=run.folder,
        detected=detected,
        recovered=recovered,
        message=message,
    )


def steps(run: Run) -> int:
    return max((int(step) for step in re.findall(r"^train +step (\d+)", run.output(), re.M)), default=0)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_goes_missing(made: Any, s3: str, tmp_path: Path, workers: int) -> None:
    recipe, url, environment, client, name = made
    path = recipe(url, str(tmp_path / "cache"), workers)
    run = Run(path, ranks=2, cwd=tmp_path, environment={**environment, "S3_ENDPOINT_URL": s3})
    run.wait_for("step 2 ")
    client.delete_object(Bucket=name, Key="books/train/shard.00012.mds")
    watch = Stopwatch()
    check_ends_with_one_message(run, "shard.00012.mds", f"shard missing mid-epoch, num_workers {workers}", watch)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_flipped_bit(made: Any, shards: Path, tmp_path: Path, workers: int) -> None:
    import shutil

    recipe, _, _, _, _ = made
    only = tmp_path / "only"
    shutil.copytree(shards, only)
    shard = only / "shard.00012.mds"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    path = recipe(None, str(only), workers)
    run = Run(path, ranks=2, cwd=tmp_path)
    run.wait_for("step 1 ")
    shard.write_bytes(content)
    watch = Stopwatch()
    check_ends_with_one_message(run, "shard.00012.mds", f"shard with a flipped bit, num_workers {workers}", watch)
    assert "Checksum failure" in run.output()


def check_ends_with_one_message(run: Run, shard: str, fault: str, watch: Stopwatch) -> None:
    """The shard is due after step 12, and its rank says so when it comes there."""
    run.wait_for("error (")
    detected = watch.seconds()
    ended = run.wait()
    assert 2 in ended.codes, ended.output
    assert 0 not in ended.codes
    lines = [line for line in ended.output.splitlines() if line.startswith("error") and shard in line]
    assert len(lines) == 1, ended.output
    assert re.search(r"rank \d, after step \d+", lines[0]), lines[0]
    assert "Traceback (" not in ended.output
    latest = run.folder / "checkpoints/latest"
    assert manifest.read(latest).step >= 8
    outcome = "one message when the shard is needed, the last checkpoint stays; exit code 2"
    observe(fault, outcome, run=run.folder, detected=detected, recovered=None, message=lines[0])
