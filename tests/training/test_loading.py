"""Loading a checkpoint runs nothing in it, tolerates ordinary changes, and fails on all ranks with one message."""

import io
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from llmtrain.checkpoint import manifest
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, launch
from llmtrain.testing.ranks import run_ranks
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.gloo_training]

LOSS = "loss/train/total"
FULL = {"sharding_strategy": "FULL_SHARD", "state_dict_type": "full", "load_monolith_rank0_only": True}


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def seal(checkpoint: Path) -> None:
    """What anyone can do who can write the checkpoint: write its manifest."""
    old = manifest.read(checkpoint)
    files = {p.name: manifest.file_entry(p) for p in checkpoint.iterdir() if p.name != manifest.MANIFEST}
    manifest.write(
        checkpoint,
        kind=old.kind,
        step=old.step,
        tokens=old.tokens,
        files=files,
        recipe=old.recipe,
        tokenizer_fingerprint=old.tokenizer_fingerprint,
    )


def edit_metadata(checkpoint: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def evil_object(checkpoint: Path, mark: Path) -> None:
    """Puts code into an object that every rank reads: the time stamp."""
    content = io.BytesIO()
    torch.save(Evil(mark), content)
    shard = checkpoint / "__0_0.distcp"
    offset = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(content.getvalue())

    def point_there(metadata: Any) -> None:
        key = next(key for key in metadata.state_dict_metadata if key.startswith("state.timestamp"))
        info = metadata.storage_data[MetadataIndex(key)]
        info.relative_path, info.offset, info.length = shard.name, offset, len(content.getvalue())

    edit_metadata(checkpoint, point_there)


def assert_one_message(run: Finished, *parts: str) -> None:
    assert set(run.codes) == {2}, run.output
    assert "Traceback" not in run.output
    assert run.output.count("error:") == 1, run.output
    for part in parts:
        assert part in run.output


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return tiny_recipe(folder / "base.yaml", corpus, eval_loader=None, max_duration="2ba", save_interval="2ba")


@pytest.fixture(scope="module")
def base(recipe: Path) -> Finished:
    """Two steps of two ranks, saved in shards."""
    run = launch(recipe, ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="module")
def full(recipe: Path, corpus: TinyCorpus) -> tuple[Path, Finished]:
    """The same with full checkpoints, which rank 0 alone reads."""
    changes: dict[str, Any] = {"eval_loader": None, "max_duration": "2ba", "save_interval": "2ba"}
    path = tiny_recipe(recipe.parent / "full.yaml", corpus, fsdp_config=FULL, **changes)
    run = launch(path, ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    return path, run


@pytest.fixture
def checkpoint(base: Finished, request: pytest.FixtureRequest) -> Path:
    """The checkpoint of a copy of that run."""
    run = base.folder.with_name(f"copy-{request.node.name.split('[')[0]}-{time.monotonic_ns()}")
    shutil.copytree(base.folder, run, symlinks=True)
    return run / "checkpoints/ep0-ba2"


def run_of(checkpoint: Path) -> str:
    return f"run_name={checkpoint.parents[1].name}"


class TestCodeInACheckpointIsNotRun:
    def test_in_the_metadata_at_a_resume(self, recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
        seal(checkpoint)
        run = launch(recipe, [run_of(checkpoint), "max_duration=4ba"], ranks=2, cwd=recipe.parent)
        assert not mark.exists()
        assert_one_message(run, ".metadata: refused, it names `posix.system`")

    @pytest.mark.parametrize("weights_only", [False, True])
    def test_in_an_object(self, weights_only: bool, recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        evil_object(checkpoint, mark)
        changes = [f"run_name=new-{weights_only}", f"load_path={checkpoint}", f"load_weights_only={weights_only}"]
        run = launch(recipe, [*changes, "max_duration=4ba"], ranks=2, cwd=recipe.parent)
        assert not mark.exists()
        if weights_only:  # does not read it
            assert run.code == 0, run.output
        else:
            assert_one_message(run, "`state.timestamp", "refused, it names `posix.system`")

    def test_in_a_full_checkpoint(self, full: tuple[Path, Finished], tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        torch.save({"state": {"model": Evil(mark)}}, tmp_path / "evil.pt")
        run = launch(full[0], ["run_name=evil", f"load_path={tmp_path / 'evil.pt'}"], ranks=2, cwd=full[0].parent)
        assert not mark.exists()
        assert_one_message(run, "refused, it names `posix.system`")

    @pytest.mark.parametrize("attack", ["code", "outside", "old-optimizer"])
    def test_from_an_object_store(self, attack: str, checkpoint: Path, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        if attack == "code":
            (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
            message = "names `posix.system`"
        elif attack == "outside":

            def leave(metadata: Any) -> None:
                for info in metadata.storage_data.values():
                    info.relative_path = f"../../{mark.name}"

            edit_metadata(checkpoint, leave)
            message = "points outside the checkpoint"
        else:  # Composer reads these with another planner
            edit_metadata(checkpoint, lambda m: m.planner_data.update({"optimizers.x": ("optimizers", "x")}))
            message = "old Composer"
        [found] = run_ranks(read_remote_metadata, 1, str(checkpoint), str(tmp_path / "to"))
        assert not mark.exists()
        assert message in found

    def test_an_archive_is_not_unpacked(self, full: tuple[Path, Finished], tmp_path: Path) -> None:
        (tmp_path / "some.tar").write_bytes(b"")
        run = launch(full[0], ["run_name=tar", f"load_path={tmp_path / 'some.tar'}"], ranks=2, cwd=full[0].parent)
        assert_one_message(run, "unpack it first")


def read_remote_metadata(source: str, target: str) -> str:
    """The error of Composer's reader for object stores; runs on a rank."""
    from composer.utils.checkpoint import DistCPObjectStoreReader
    from composer.utils.object_store import ObjectStore

    from llmtrain.errors import UserError
    from llmtrain.training import composer_adapter

    class Folder(ObjectStore):  # type: ignore[misc]
        def download_object(self, object_name: str, filename: Any, *args: Any, **kwargs: Any) -> None:
            shutil.copy(object_name, filename)

    composer_adapter.install()
    try:
        DistCPObjectStoreReader(source, target, object_store=Folder()).read_metadata()
    except UserError as error:
        return str(error)
    return "read"


def test_callbacks_come_and_go_and_a_new_torch_may_keep_more(
    recipe: Path, corpus: TinyCorpus, checkpoint: Path, full: tuple[Path, Finished]
) -> None:
    def without_is_initial(metadata: Any) -> None:
        for key in [key for key in metadata.state_dict_metadata if key.endswith("._is_initial")]:
            del metadata.state_dict_metadata[key]

    edit_metadata(checkpoint, without_is_initial)
    changes: dict[str, Any] = {"eval_loader": None, "save_interval": "2ba", "callbacks": {"speed_monitor": {}}}
    more = tiny_recipe(recipe.parent / "more.yaml", corpus, **changes, max_duration="4ba")
    run = launch(more, [run_of(checkpoint)], ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    lines = [line for line in run.output.splitlines() if " lacks " in line]
    assert len(lines) == 1, run.output
    assert "state.callbacks.SpeedMonitor.total_eval_wct" in lines[0]
    assert "_is_initial" in lines[0]
    assert list(run.metrics(LOSS)) == [0, 1, 2, 3]
    run = launch(recipe, [run_of(checkpoint), "max_duration=6ba"], ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    assert " lacks " not in run.output
    assert list(run.metrics(LOSS)) == [0, 1, 2, 3, 4, 5]


def test_anything_else_missing_is_one_message(recipe: Path, checkpoint: Path) -> None:
    def without_moments(metadata: Any) -> None:
        for key in [key for key in metadata.state_dict_metadata if key.endswith(".exp_avg")]:
            del metadata.state_dict_metadata[key]

    edit_metadata(checkpoint, without_moments)
    run = launch(recipe, [run_of(checkpoint), "max_duration=4ba"], ranks=2, cwd=recipe.parent)
    assert_one_message(run, "ep0-ba2 lacks `state.optimizers.", ".exp_avg` and ", "load_weights_only=true")


def test_full_checkpoints_are_verified_behind_composers_link(full: tuple[Path, Finished]) -> None:
    recipe, run = full
    copy = run.folder.with_name("full-again")
    shutil.copytree(run.folder, copy, symlinks=True)
    changes = ["run_name=full-again", "max_duration=4ba", "python_log_level=warning"]
    again = launch(recipe, changes, ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert list(again.metrics(LOSS)) == [0, 1, 2, 3]
    assert "unverified" not in again.output


@pytest.mark.parametrize("problem", ["damaged", "foreign", "other-model"])
def test_a_failure_of_the_only_reader_ends_all_ranks(problem: str, full: tuple[Path, Finished], tmp_path: Path) -> None:
    recipe, run = full
    alone = tmp_path / "alone.pt"  # without a manifest, which would tell before anything is loaded
    shutil.copy(run.folder / "checkpoints/ep0-ba2/full.pt", alone)
    changes = [f"run_name=alone-{problem}", f"load_path={alone}", "load_weights_only=true"]
    message = "alone.pt"
    if problem == "damaged":
        with alone.open("r+b") as file:
            file.truncate(alone.stat().st_size // 2)
    elif problem == "foreign":
        torch.save({"weights": torch.ones(3)}, alone)
    else:
        changes.append("model.n_layers=3")
        message = "lacks `model.transformer.blocks.2."
    start = time.monotonic()
    ended = launch(recipe, changes, ranks=2, cwd=recipe.parent, timeout=60)
    assert time.monotonic() - start < 30  # a few seconds; the process group would have waited for 10 minutes
    assert_one_message(ended, message)
