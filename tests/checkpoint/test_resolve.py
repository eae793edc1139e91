import os
from pathlib import Path

import pytest

from llmtrain.checkpoint import manifest, resolve
from llmtrain.errors import UserError


def add(folder: Path, name: str, step: int) -> Path:
    checkpoint = folder / name
    checkpoint.mkdir(parents=True)
    (checkpoint / "full.pt").write_bytes(name.encode() * 50)
    manifest.write(
        checkpoint,
        kind="full",
        step=step,
        tokens=0,
        files={"full.pt": manifest.file_entry(checkpoint / "full.pt")},
        recipe={},
        tokenizer_fingerprint=None,
    )
    return checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    for name, step in (("ep0-ba9", 9), ("ep0-ba10", 10), ("ep1-ba100", 100)):
        add(folder, name, step)
    (folder / "latest").symlink_to("ep0-ba9")
    (folder / ".saving-ep1-ba200").mkdir()
    (folder / "notes").mkdir()
    return folder


def test_newest_first_by_number_not_by_name(folder: Path) -> None:
    assert [info.path.name for info in resolve.checkpoints_in(folder)] == ["ep1-ba100", "ep0-ba10", "ep0-ba9"]
    said: list[str] = []
    assert resolve.newest_complete(folder, said.append) == folder / "ep1-ba100"
    assert said == []


def test_each_bad_one_is_named_and_the_one_before_it_is_taken(folder: Path) -> None:
    data = bytearray((folder / "ep1-ba100" / "full.pt").read_bytes())
    data[7] ^= 1
    (folder / "ep1-ba100" / "full.pt").write_bytes(bytes(data))
    os.truncate(folder / "ep0-ba10" / "full.pt", 3)
    (folder / "ep2-ba300").mkdir()
    said: list[str] = []
    assert resolve.newest_complete(folder, said.append) == folder / "ep0-ba9"
    assert len(said) == 3
    assert "ep2-ba300" in said[0]
    assert "never finished" in said[0]
    assert "ep1-ba100/full.pt: hash differs" in said[1]
    assert "ep0-ba10/full.pt: 3 bytes instead of" in said[2]


def test_none_when_all_are_bad_but_they_stay_listed(tmp_path: Path) -> None:
    checkpoint = add(tmp_path, "ep0-ba1", 1)
    (checkpoint / "full.pt").unlink()
    assert resolve.newest_complete(tmp_path, lambda _: None) is None
    assert len(resolve.checkpoints_in(tmp_path)) == 1
    with pytest.raises(UserError, match="no complete checkpoint: ep0-ba1"):
        resolve.locate(tmp_path)


def test_a_missing_or_empty_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert resolve.checkpoints_in(tmp_path / "nowhere") == []
    assert resolve.newest_complete(tmp_path, lambda _: None) is None
    with pytest.raises(UserError, match="no such file"):
        resolve.locate(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        resolve.locate(tmp_path)
    (tmp_path / "ep0-ba1").mkdir()
    with pytest.raises(UserError, match="unfinished checkpoint"):
        resolve.locate(tmp_path / "ep0-ba1")


def test_locate_from_everywhere(folder: Path, tmp_path: Path) -> None:
    newest = folder / "ep1-ba100"
    assert resolve.locate(folder.parent) == newest
    assert resolve.locate(folder) == newest
    assert resolve.locate(folder / "ep0-ba10") == folder / "ep0-ba10"
    assert resolve.locate(folder / "ep0-ba10" / "full.pt") == folder / "ep0-ba10" / "full.pt"


def test_the_latest_link_is_never_trusted(folder: Path) -> None:
    assert resolve.locate(folder / "latest") == folder / "ep1-ba100"
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("ep7-ba777")
    assert resolve.locate(folder / "latest") == folder / "ep1-ba100"


def test_the_run_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert resolve.run_folder(folder / "ep0-ba9") == folder.parent
    assert resolve.run_folder(folder / "latest") == folder.parent
    assert resolve.run_folder(folder / "ep0-ba9" / "full.pt") == folder.parent
    assert resolve.run_folder(folder / "ep0-ba9-rank0.pt") == folder.parent
    assert resolve.run_folder(tmp_path) is None
