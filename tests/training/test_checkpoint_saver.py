"""The folder of checkpoints, and what failures do, without a training."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint import manifest
from llmtrain.checkpoint.code_version import code_version, commit_of
from llmtrain.checkpoint.retention import Retention
from llmtrain.errors import UserError
from llmtrain.training.checkpoint_folder import CheckpointFolder, Moment
from llmtrain.training.hashed_files import hashed, write_full
from llmtrain.training.save_failures import SaveFailures, StepsLostError
from llmtrain.training.save_space import free_space_warning

RECORD: dict[str, Any] = {"recipe": {"run_name": "x"}, "tokenizer_fingerprint": None}


def opened(path: Path, keep: int = -1, every: str | None = None, **options: Any) -> CheckpointFolder:
    folder = CheckpointFolder(path, Retention(keep, every), RECORD, **options)
    folder.open()
    return folder


def publish(folder: CheckpointFolder, step: int, epoch: int = 0) -> Path:
    moment = Moment(epoch, step, step * 10, "full")
    staged = folder.stage(moment.name, None)
    folder.publish(moment, write_full(staged, {"state": step}))
    return folder.path / moment.name


def names(path: Path) -> list[str]:
    return sorted((p.name for p in path.glob("ep*")), key=lambda name: int(name.split("ba")[1]))


def test_a_checkpoint_is_hashed_while_it_is_written_and_names_the_code(tmp_path: Path) -> None:
    checkpoint = publish(opened(tmp_path), 5)
    assert manifest.verify(checkpoint) == []
    content = manifest.read(checkpoint)
    assert (content.step, content.tokens, content.recipe) == (5, 50, {"run_name": "x"})
    assert content.code == code_version()
    assert len(content.code["files"]) == 32
    assert (tmp_path / "latest").readlink() == Path("ep0-ba5")
    assert list((tmp_path / ".saving").iterdir()) == [tmp_path / ".saving/shared"]


def test_the_commit_is_read_without_git(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) is None  # no commit yet
    (git / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert commit_of(tmp_path) == "a" * 40
    (git / "refs/heads/main").write_text("b" * 40 + "\n")
    assert commit_of(tmp_path) == "b" * 40
    (git / "HEAD").write_text("c" * 40 + "\n")
    assert commit_of(tmp_path) == "c" * 40


def test_retention_is_a_function_of_what_lies_on_disk_and_survives_restarts(tmp_path: Path) -> None:
    folder = opened(tmp_path, keep=2, every="10ba")
    for step in range(3, 34, 3):
        if step in (15, 24):
            folder.close()
            folder = opened(tmp_path, keep=2, every="10ba")
        publish(folder, step)
    assert names(tmp_path) == ["ep0-ba12", "ep0-ba21", "ep0-ba30", "ep0-ba33"]


def test_the_best_and_the_damaged_stay_and_hooks_are_asked(tmp_path: Path) -> None:
    folder = opened(tmp_path, keep=1, refused=["ep0-ba2"])
    folder.protected = "ep0-ba1"
    published: list[str] = []
    folder.published_hooks.append(lambda path: published.append(path.name))
    folder.published_hooks.append(lambda path: 1 / 0)  # type: ignore[arg-type,return-value]
    folder.may_delete_hooks.append(lambda path: path.name != "ep0-ba3")
    for step in (1, 3, 4, 5):
        publish(folder, step)
    assert names(tmp_path) == ["ep0-ba1", "ep0-ba3", "ep0-ba5"]
    assert published == ["ep0-ba1", "ep0-ba3", "ep0-ba4", "ep0-ba5"]


def test_after_a_kill_latest_points_to_a_complete_one_and_leftovers_go(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    publish(folder, 1)
    publish(folder, 2)
    (tmp_path / "ep0-ba2/manifest.json").unlink()
    (tmp_path / ".saving/ep0-ba3").mkdir()
    assert opened(tmp_path).open() == "ep0-ba1"
    assert (tmp_path / "latest").readlink() == Path("ep0-ba1")
    assert not (tmp_path / ".saving/ep0-ba3").exists()


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    folder = opened(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").rename(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError):
        folder.stage("ep0-ba1", None)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "unmounted").rename(tmp_path / "checkpoints")
    publish(folder, 1)


def test_a_write_that_fails_says_what_the_system_said(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "full.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), hashed(tmp_path / "full.pt", {}) as stream:
        stream.write(os.urandom(100_000))


def test_failures_are_counted_and_the_first_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = [Moment(0, step, 0, "sharded") for step in (4, 8, 12)]
    with pytest.raises(UserError, match="It is the first of this run"):
        SaveFailures(tmp_path, None, 0).failed(at[0], "No space left on device (0.00 GB free)")
    failures = SaveFailures(tmp_path, None, 0)
    failures.succeeded(at[0])
    failures.failed(at[1], "No space left on device (0.00 GB free)")
    assert not failures.time_for_another_try
    said = capsys.readouterr().err
    assert "ep0-ba8: No space left on device (0.00 GB free)" in said
    assert "ep0-ba4 is kept, 4 step(s) behind" in said
    failures.failed(at[2], "x")
    assert "8 step(s) behind. Tried again in 30 s" in capsys.readouterr().err
    lost = failures.give_up(at[2], "x")
    assert isinstance(lost, StepsLostError)
    assert lost.exit_code == 1
    assert "8 step(s) since ep0-ba4 are lost" in str(lost)
    failures.succeeded(at[2])
    assert "saving works again" in capsys.readouterr().err
    assert failures.in_a_row == 0


def test_space_is_counted_for_the_one_in_flight_and_not_for_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 2_500

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert free_space_warning(tmp_path, 1_000, 1) is None  # one that is kept, one that is written
    assert "0.0 GB are needed" in (free_space_warning(tmp_path, 1_000, 2) or "")
    publish(opened(tmp_path), 1)
    assert free_space_warning(tmp_path, 1_000, 2) is None
    assert free_space_warning(tmp_path, 1_000, 2, best=True) is not None


def test_what_could_not_go_before_goes_before_the_next_is_written(tmp_path: Path) -> None:
    """A disk that is full of them takes no new one, and only a new one used to have them deleted."""
    folder, arrived = opened(tmp_path, keep=1), False
    folder.may_delete_hooks.append(lambda path: arrived)
    for step in (1, 2, 3):
        publish(folder, step)
    folder.stage("ep0-ba4", "ep0-ba3")
    assert names(tmp_path) == ["ep0-ba1", "ep0-ba2", "ep0-ba3"]
    arrived = True
    folder.stage("ep0-ba4", "ep0-ba3")
    assert names(tmp_path) == ["ep0-ba3"]


def test_one_that_cannot_be_deleted_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opened(tmp_path, keep=1, replaces=[tmp_path / "ep0-ba9"])
    delete = CheckpointFolder._delete

    def refuse(self: CheckpointFolder, path: Path) -> None:
        if path.name in ("ep0-ba1", "ep0-ba9"):
            raise OSError(16, "Device or resource busy", str(path))
        delete(self, path)

    earlier = opened(tmp_path)
    publish(earlier, 9)
    monkeypatch.setattr(CheckpointFolder, "_delete", refuse)
    for step in (1, 2, 3):
        publish(folder, step)
    assert names(tmp_path) == ["ep0-ba1", "ep0-ba3", "ep0-ba9"]  # the last is no newest one of this run
    said = capsys.readouterr().err
    assert "ep0-ba1 was not deleted: Device or resource busy" in said
    assert "ep0-ba9 was not deleted" in said
    assert folder.replaces == [tmp_path / "ep0-ba9"]


def test_a_checkpoint_whose_files_have_gone_meanwhile_is_not_published(tmp_path: Path) -> None:
    folder = opened(tmp_path, keep=1)
    publish(folder, 1)
    moment = Moment(0, 2, 20, "full")
    staged = folder.stage(moment.name, "ep0-ba1")
    entries = write_full(staged, {"state": 2})
    (staged / "full.pt").unlink()  # as by a second start of the same run
    with pytest.raises(OSError, match=r"full\.pt: missing"):
        folder.publish(moment, entries)
    assert names(tmp_path) == ["ep0-ba1"]
    assert (tmp_path / "latest").readlink() == Path("ep0-ba1")


def test_what_a_step_back_has_set_aside_gives_way_to_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    folder = opened(tmp_path)
    size = sum(file.stat().st_size for file in publish(folder, 1).iterdir())
    (tmp_path / ".set-aside/ep0-ba9").mkdir(parents=True)
    Usage.free = size
    folder.stage("ep0-ba2", "ep0-ba1")
    assert (tmp_path / ".set-aside").is_dir()
    Usage.free = size - 1
    folder.stage("ep0-ba2", "ep0-ba1")
    assert not (tmp_path / ".set-aside").exists()
    assert "ep0-ba9 deleted: there is no room for the next" in capsys.readouterr().err


def test_a_copy_with_a_name_of_its_own_neither_goes_nor_counts(tmp_path: Path) -> None:
    folder = opened(tmp_path, keep=2)
    shutil.copytree(publish(folder, 1), tmp_path / "mine")
    for step in (2, 3, 4):
        publish(folder, step)
        shutil.copytree(tmp_path / "mine", tmp_path / f"mine-{step}")
    assert names(tmp_path) == ["ep0-ba3", "ep0-ba4"]
    assert (tmp_path / "mine").is_dir()


def test_the_best_stays_where_the_recipe_has_best_checkpoint_no_more(tmp_path: Path) -> None:
    folder = opened(tmp_path, keep=1)
    moment = Moment(0, 1, 10, "full", ("loss", "eval", 1.0))
    folder.publish(moment, write_full(folder.stage(moment.name, None), {}))
    again = opened(tmp_path, keep=1)
    for step in (2, 3):
        publish(again, step)
    assert names(tmp_path) == [moment.name, "ep0-ba3"]
    anew = opened(tmp_path, keep=1, replaces=[tmp_path / "ep0-ba1", tmp_path / "ep0-ba3"])
    publish(anew, 4)
    assert names(tmp_path) == ["ep0-ba4"]
