"""A checkpoint written beside the training is the one that a save with waiting would have written."""

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.launch import Finished, Run, launch
from llmtrain.testing.ranks import run_ranks
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.testing.state import same_state
from llmtrain.training.saved_state import KnownItems

LOSS = "loss/train/total"


def both_ways(folder: str) -> dict[str, Any]:
    """The same state through torch's own save, and through a copy that is written after training has gone on."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from llmtrain.training.hashed_files import write_sharded
    from llmtrain.training.saved_state import HostMemory, KnownItems, TakenState

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3, dtype=torch.bfloat16))
    fully_shard(model[0], mesh=(mesh := init_device_mesh("cpu", (dist.get_world_size(),))))
    fully_shard(model[1], mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model[1](model[0](torch.ones(4, 7)).bfloat16()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    counter: dict[str, Any] = {"steps": [1, 2, 3], "loss": 0.5}  # changes in place, as states of callbacks do

    def content() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        state = {
            "model": weights,
            "optimizers": moments,
            "callbacks": counter,
            "odd": torch.ones(3, len(counter["steps"])).t(),
        }
        return {"state": state, **({"rng": [torch.get_rng_state()]} if dist.get_rank() == 0 else {})}

    memory, known, group = HostMemory(), KnownItems(), dist.new_group(backend="gloo")
    sizes = []
    for number in range(4):  # memory and plan are used again
        step()
        if number == 3:  # another type, a key more and one less than was planned before
            counter |= {"steps": torch.ones(3), "more": 1}
            del counter["loss"]
        plain, copied = Path(folder) / f"plain{number}", Path(folder) / f"copied{number}"
        save(
            content(),
            storage_writer=FileSystemWriter(plain),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        )
        taken = TakenState(content(), memory, known)
        step()
        if number < 3:
            counter["steps"].append(number)
        torch.manual_seed(number + 5)
        entries = write_sharded(copied, taken, group)
        sizes.append({name: (entry.size, entry.xxh128) for name, entry in entries.items()})
        counter["loss"] = counter.get("loss", 0.0) + 1.0
    return {"entries": sizes}


def test_files_are_those_of_a_save_with_waiting_byte_by_byte(tmp_path: Path) -> None:
    ranks = run_ranks(both_ways, 2, str(tmp_path))
    for number in range(4):
        plain, copied = tmp_path / f"plain{number}", tmp_path / f"copied{number}"
        for name in ("__0_0.distcp", "__1_0.distcp"):
            assert (plain / name).read_bytes() == (copied / name).read_bytes(), (number, name)
        one, other = (replace(FileSystemReader(each).read_metadata(), storage_meta=None) for each in (plain, copied))
        assert one == other  # but for the ids of saves and of this look
        written = {name: entry for rank in ranks for name, entry in rank["entries"][number].items()}
        assert (
            sorted(written)
            == sorted(path.name for path in copied.iterdir())
            == [
                ".metadata",
                "__0_0.distcp",
                "__1_0.distcp",
            ]
        )
        for name, (size, digest) in written.items():
            assert manifest.file_entry(copied / name) == manifest.FileEntry(size=size, xxh128=digest)


def test_a_plan_is_used_again_for_what_has_not_changed() -> None:
    known = KnownItems()
    state: dict[str, Any] = {"w": torch.ones(3, 4), "lr": 0.1, "step": torch.tensor(1.0)}
    first = known.of(state)
    state["w"], state["lr"] = torch.zeros(3, 4), 0.2
    assert [one is other for one, other in zip(first, known.of(state), strict=True)] == [True, True, True]
    for changed in (torch.ones(4, 3), torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(3, 4, requires_grad=True), 5):
        known.of({"w": torch.ones(3, 4)})
        state = {"w": changed}
        assert known.of(state) == create_default_local_save_plan(state, False).items
    assert known.of({}) == []


@pytest.fixture(scope="module")
def recipe(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("runs") / "beside.yaml", corpus, save_interval="1ba", eval_loader=None)


@pytest.fixture(scope="module")
def beside(recipe: Path) -> Finished:
    run = launch(recipe, ranks=2, cwd=recipe.parent)
    assert run.code == 0, run.output
    return run


@pytest.mark.slow
@pytest.mark.gloo_training
def test_training_and_checkpoints_are_the_same_with_and_without(recipe: Path, beside: Finished) -> None:
    waiting = launch(recipe, ["run_name=waiting", "save_async=false"], ranks=2, cwd=recipe.parent)
    assert waiting.code == 0, waiting.output
    assert "beside the training" in beside.output
    assert "beside the training" not in waiting.output
    assert beside.metrics(LOSS) == waiting.metrics(LOSS)
    for step in range(1, 13):
        same_state(*(run.folder / f"checkpoints/ep0-ba{step}" for run in (beside, waiting)))
    assert not list(beside.folder.glob("checkpoints/.saving"))


def complete(run: Path) -> list[str]:
    """Names of checkpoints, after a look that each is what it claims to be, and `latest` as well."""
    folder = run / "checkpoints"
    names = []
    for info in checkpoints_in(folder):
        assert manifest.verify(info.path) == [], info.path
        names.append(info.path.name)
    if (folder / "latest").is_symlink():
        assert (folder / "latest").readlink().name in names
    return names


KILL = """
import os, signal
from pathlib import Path
from llmtrain.training import checkpoint_folder, hashed_files
from llmtrain.checkpoint import manifest

calls = {{"n": 0}}

def die(function):
    def call(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == {after} and int(os.environ["RANK"]) == {rank}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if not Path({marker!r}).exists():
    {place} = die({place})
"""

PLACES = {
    "a shard": ("hashed_files.HashedFile.write", 1200, 1),
    "metadata": ("hashed_files.HashedFiles.rename", 3, 0),
    "manifest": ("manifest.write", 3, 0),
    "rename": ("manifest.sync_folder", 6, 0),
    "latest": ("checkpoint_folder.CheckpointFolder._link_latest", 3, 0),
    "deleting": ("checkpoint_folder.CheckpointFolder._delete", 2, 0),
    "staging": ("checkpoint_folder.CheckpointFolder.stage", 3, 0),
}


@pytest.mark.slow
@pytest.mark.gloo_training
@pytest.mark.parametrize("place", [pytest.param(p, marks=[] if p == "a shard" else [pytest.mark.long]) for p in PLACES])
def test_killed_in_the_middle_of_a_save_nothing_incomplete_is_left(recipe: Path, beside: Finished, place: str) -> None:
    where, after, rank = PLACES[place]
    name = "killed-" + place.replace(" ", "-")
    code, marker = recipe.parent / f"{name}.py", recipe.parent / f"{name}.again"
    code.write_text(KILL.format(place=where, after=after, rank=rank, marker=str(marker)))
    options = ["--trust-code", f"run_name={name}", f"code_paths=[{code}]", "save_num_checkpoints_to_keep=2"]
    killed = launch(recipe, options, ranks=2, cwd=recipe.parent)
    assert killed.codes[rank] == -signal.SIGKILL, killed.output
    complete(killed.folder)
    marker.touch()
    again = launch(recipe, options, ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert again.metrics(LOSS) == beside.metrics(LOSS)
    assert complete(again.folder) == ["ep0-ba12", "ep0-ba11"]
    assert sorted(path.name for path in (again.folder / "checkpoints").iterdir()) == ["ep0-ba11", "ep0-ba12", "latest"]
    same_state(again.folder / "checkpoints/ep0-ba12", beside.folder / "checkpoints/ep0-ba12")


SLOW_WRITE = """
import time
from llmtrain.training import hashed_files

write = hashed_files.write_sharded

def slowly(*args):
    time.sleep(1.5)
    return write(*args)

from llmtrain.training import checkpoint_saver
checkpoint_saver.write_sharded = slowly
"""


@pytest.mark.slow
@pytest.mark.gloo_training
def test_sigterm_while_a_save_is_in_flight_waits_for_it_and_saves_the_last_step(recipe: Path) -> None:
    code = recipe.parent / "slow.py"
    code.write_text(SLOW_WRITE)
    options = ["--trust-code", "run_name=preempted", f"code_paths=[{code}]", "save_interval=3ba", "max_duration=500ba"]
    run = Run(recipe, options, ranks=2, cwd=recipe.parent)
    run.wait_for("step 4 ")  # the save of step 3 has begun, and takes longer than a step
    assert "ep0-ba3 " not in run.output()
    run.send(signal.SIGTERM)
    started = time.monotonic()
    ended = run.wait()
    assert ended.codes == (143, 143), ended.output
    assert time.monotonic() - started < 60
    names = complete(ended.folder)
    step = int(ended.output.split("stopped after step ")[1].split(";")[0])
    assert {"ep0-ba3", f"ep0-ba{step}"} <= set(names)
    assert not (ended.folder / "checkpoints/.saving").exists()
