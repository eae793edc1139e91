"""The disk of the checkpoints fills up, turns read-only or goes away while two ranks train, and comes back."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.testing.corpus import TinyCorpus
from llmtrain.testing.faults import Stopwatch, observe
from llmtrain.testing.launch import Run, launch, read_metric
from llmtrain.testing.recipe import tiny_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo_training,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting takes root on Linux"),
]

LOSS = "loss/train/total"
PATIENCE = 300.0


class Disk:
    """A tmpfs where the checkpoints of a run go."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", "size=64m", "none")

    def remount(self, options: str) -> None:
        self._mount("-o", f"remount,{options}")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.place)], check=False, capture_output=True)

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(self.place)], check=True, capture_output=True)


@pytest.fixture
def recipe(corpus: TinyCorpus, tmp_path: Path) -> Path:
    return tiny_recipe(
        tmp_path / "disk.yaml",
        corpus,
        max_duration="4000ba",
        save_interval="5ba",
        save_num_checkpoints_to_keep=1,
        eval_loader=None,
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        mounted = Disk(tmp_path / "runs/disk/checkpoints")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error.stderr!r}")
    yield mounted
    mounted.unmount()


def until(run: Run, happened, patience: float = PATIENCE) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < deadline, run.output()
        assert all(process.is_alive() for process in run.processes), run.output()
        time.sleep(0.02)


def steps(run: Run) -> int:
    return max(read_metric(run.folder, LOSS), default=0)


def sound(folder: Path) -> list[str]:
    """Names of the checkpoints, after a look at each, and at `latest`."""
    found = [info.path for info in checkpoints_in(folder)]
    assert all(manifest.verify(path) == [] for path in found), found
    assert (folder / "latest").resolve() in [path.resolve() for path in found]
    return [path.name for path in found]


FAULTS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.mark.parametrize("fault", ["read-only", pytest.param("full", marks=pytest.mark.long)])
def test_training_goes_on_and_saving_works_again_when_the_disk_does(fault: str, recipe: Path, disk: Disk) -> None:
    run = Run(recipe, ranks=2, cwd=recipe.parent)
    run.wait_for("ep0-ba5 ")
    if fault == "full":
        used = shutil.disk_usage(disk.place).used
        disk.remount(f"size={used + used // 2}")
    else:
        until(run, lambda: _remounted(disk))  # refused while a file is open for writing
    watch = Stopwatch()
    run.wait_for("NOT SAVED")
    detected, before = watch.seconds(), steps(run)
    until(run, lambda: steps(run) > before)
    recovered = watch.seconds()
    kept = sound(disk.place)
    assert len(kept) >= 1
    message = next(line for line in run.output().splitlines() if "NOT SAVED" in line)
    assert FAULTS[fault] in message
    assert "GB free" in message
    assert f"{kept[0]} is kept" in message
    assert str(run.folder / "checkpoints") in str(run.folder.parent.parent / message.split("NOT SAVED: ")[1])
    disk.remount("size=64m" if fault == "full" else "rw")
    run.wait_for("saving works again")
    until(run, lambda: len(sound_or_changing(disk.place)) == 1)
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert ended.codes == (143, 143), ended.output
    assert len(sound(disk.place)) == 1
    assert not (disk.place / ".saving").exists()
    observe(
        f"disk of the checkpoints {fault}",
        "training goes on, the last good checkpoint stays; saved again when the disk can be written",
        run=run.folder,
        detected=detected,
        recovered=recovered,
        message=message,
    )


def _remounted(disk: Disk) -> bool:
    try:
        disk.remount("ro")
    except subprocess.CalledProcessError:
        return False
    return True


def sound_or_changing(folder: Path) -> list[str]:
    try:
        return sound(folder)
    except AssertionError:  # one is published or deleted just now
        return []


@pytest.mark.long
def test_steps_that_cannot_be_saved_at_the_end_are_named_and_the_run_goes_on_later(recipe: Path, disk: Disk) -> None:
    run = Run(recipe, ["max_duration=40ba"], ranks=2, cwd=recipe.parent)
    run.wait_for("ep0-ba5 ")
    used = shutil.disk_usage(disk.place).used
    disk.remount(f"size={used + used // 2}")
    ended = run.wait()
    assert ended.codes == (1, 1), ended.output
    assert "step(s) since" in ended.output
    assert "Traceback" not in ended.output
    [kept] = sound(disk.place)
    disk.remount("size=64m")
    again = launch(recipe, ["max_duration=40ba"], ranks=2, cwd=recipe.parent)
    assert again.code == 0, again.output
    assert f"step {kept.split('ba')[1]}" in again.output
    assert sound(disk.place) == ["ep0-ba40"]


@pytest.mark.long
def test_a_run_that_cannot_save_at_all_ends_with_its_first_save(recipe: Path, disk: Disk) -> None:
    disk.remount("size=200k")
    ended = launch(recipe, ranks=2, cwd=recipe.parent)
    assert ended.codes == (2, 2), ended.output
    assert "It is the first of this run" in ended.output
    assert "No space left on device" in ended.output
    assert not list(disk.place.glob("ep*"))


@pytest.mark.long
def test_a_disk_that_goes_away_is_not_replaced_by_its_mount_point(recipe: Path, disk: Disk) -> None:
    run = Run(recipe, ranks=2, cwd=recipe.parent)
    run.wait_for("ep0-ba5 ")
    watch = Stopwatch()
    disk.unmount()
    run.wait_for("NOT SAVED")
    detected, before = watch.seconds(), steps(run)
    until(run, lambda: steps(run) > before)
    recovered = watch.seconds()
    message = next(line for line in run.output().splitlines() if "NOT SAVED" in line)
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert ended.codes == (1, 1), ended.output
    assert not list(disk.place.glob("ep*"))
    observe(
        "disk of the checkpoints unmounted",
        "training goes on; nothing is written to the mount point",
        run=run.folder,
        detected=detected,
        recovered=recovered,
        message=message,
    )


@pytest.mark.parametrize("fault", ["torn", pytest.param("with a flipped bit", marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(fault: str, corpus: TinyCorpus, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "damaged.yaml", corpus, eval_loader=None)
    whole = launch(recipe, ranks=2, cwd=tmp_path)
    assert whole.code == 0, whole.output
    folder = whole.folder / "checkpoints"
    shard = folder / "ep0-ba12/__1_0.distcp"
    content = bytearray(shard.read_bytes())
    if fault == "torn":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    losses = whole.metrics(LOSS)
    watch = Stopwatch()
    run = Run(recipe, ranks=2, cwd=tmp_path)
    run.wait_for("is refused")
    detected = watch.seconds()
    run.wait_for("step 9 ")
    recovered = watch.seconds()
    # Mended at the start; the step is the last but three, so the run may have made it anew.
    assert (folder / "latest").readlink().name == "ep0-ba8" or manifest.verify(folder / "ep0-ba12") == []
    ended = run.wait()
    assert ended.code == 0, ended.output
    message = next(line for line in ended.output.splitlines() if "is refused" in line)
    assert "ep0-ba12/__1_0.distcp" in message
    assert ended.metrics(LOSS) == losses
    assert "ep0-ba12" in sound(folder)
    observe(
        f"checkpoint {fault}: the newest, in one file",
        "named; the one before it is taken, and the steps are repeated with the same bits",
        run=whole.folder,
        detected=detected,
        recovered=recovered,
        message=message,
    )
