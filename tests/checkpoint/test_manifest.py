import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.checkpoint import manifest, validation
from llmtrain.errors import UserError


def make(
    folder: Path, *, step: int = 3, names: tuple[str, ...] = (".metadata", "__0_0.distcp", "__1_0.distcp")
) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(bytes(range(200)) * (i + 1))
    manifest.write(
        folder,
        kind="sharded",
        step=step,
        tokens=step * 64,
        files={name: manifest.file_entry(folder / name) for name in names},
        recipe={"model": {"d_model": 8, "betas": (0.9, 0.95), 3: None}},
        tokenizer_fingerprint="ab" * 32,
        attention={"kernel": "sdpa", "reason": "the fastest here"},
    )
    return folder


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "ep0-ba3")
    content = manifest.read(folder)
    assert (content.kind, content.step, content.tokens, content.format) == ("sharded", 3, 192, 1)
    assert content.recipe == {"model": {"d_model": 8, "betas": [0.9, 0.95], "3": None}}
    assert content.attention == {"kernel": "sdpa", "reason": "the fastest here"}
    assert content.versions["torch"]
    assert manifest.verify(folder) == []
    assert sorted(p.name for p in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(name=st.sampled_from([".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]), at=st.integers(0, 199))
def test_any_flipped_bit_is_found_and_the_file_is_named(tmp_path_factory, name: str, at: int) -> None:
    folder = make(tmp_path_factory.mktemp("flip") / "ep0-ba3")
    flip(folder / name, at)
    problems = manifest.verify(folder)
    assert len(problems) == 1
    assert f"ep0-ba3/{name}" in problems[0]
    assert "hash differs" in problems[0] or name == "manifest.json"


def test_truncated_missing_and_unfinished(tmp_path: Path) -> None:
    folder = make(tmp_path / "ep0-ba3")
    os.truncate(folder / "__1_0.distcp", 10)
    (folder / "__0_0.distcp").unlink()
    assert manifest.verify(folder) == ["ep0-ba3/__0_0.distcp: missing", "ep0-ba3/__1_0.distcp: 10 bytes instead of 600"]
    (folder / "manifest.json").unlink()
    assert "never finished" in manifest.verify(folder)[0]


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "ep0-ba3") / "manifest.json"
    body = json.loads(path.read_text())
    body["step"] = 4
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match="checksum differs"):
        manifest.read(path.parent)


def test_a_newer_format_says_update(tmp_path: Path) -> None:
    path = make(tmp_path / "ep0-ba3") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match="format 2 is newer"):
        manifest.read(path.parent)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "manifest.json"])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no name of a file"):
        manifest.write(
            tmp_path,
            kind="full",
            step=1,
            tokens=1,
            files={name: manifest.FileEntry(size=0, xxh128="")},
            recipe={},
            tokenizer_fingerprint=None,
        )


def test_a_sharded_checkpoint_must_list_its_metadata(tmp_path: Path) -> None:
    folder = make(tmp_path / "ep0-ba3", names=("__0_0.distcp",))
    assert "lists no .metadata" in manifest.verify(folder)[0]


class TestComposersHook:
    def test_intact_and_flipped(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "ep0-ba3")
        assert validation.validate(str(folder / "__0_0.distcp"), [(0, 10)])
        assert validation.validate(folder / ".metadata")
        flip(folder / "__1_0.distcp", 77)
        assert not validation.validate(folder / "__1_0.distcp", [(0, 10)])

    def test_links_are_followed_to_the_manifest(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Composer links full checkpoints into a temporary folder; a store of files by hash lies behind others."""
        folder = make(tmp_path / "ep0-ba3")
        (tmp_path / "blobs").mkdir()
        blob = (folder / "__1_0.distcp").rename(tmp_path / "blobs/1234")
        (folder / "__1_0.distcp").symlink_to("../blobs/1234")
        for name in ("__0_0.distcp", "__1_0.distcp"):
            link = tmp_path / f"link-to-{name}"
            link.symlink_to(folder / name)
            assert validation.validate(link)
        assert "unverified" not in caplog.text
        flip(blob, 77)
        assert validation.validate(tmp_path / "link-to-__0_0.distcp")
        assert not validation.validate(tmp_path / "link-to-__1_0.distcp")
        with pytest.raises(UserError, match=r"__1_0\.distcp: hash differs"):
            validation.require(tmp_path / "link-to-__1_0.distcp")

    def test_a_file_is_hashed_once_a_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = make(tmp_path / "ep0-ba3")
        hashed = []
        real = manifest.file_entry
        monkeypatch.setattr(manifest, "file_entry", lambda path: hashed.append(path.name) or real(path))
        for _ in range(3):
            assert validation.validate(folder / "__0_0.distcp", [(0, 1)])
        assert hashed == ["__0_0.distcp"]

    def test_unlisted_and_missing_files_are_refused(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "ep0-ba3")
        (folder / "__7_0.distcp").write_bytes(b"smuggled in")
        assert not validation.validate(folder / "__7_0.distcp")
        assert not validation.validate(folder / "__8_0.distcp")

    def test_a_damaged_manifest_is_refused(self, tmp_path: Path) -> None:
        folder = make(tmp_path / "ep0-ba3")
        (folder / "manifest.json").write_text("{")
        assert not validation.validate(folder / ".metadata")

    def test_another_trainers_checkpoint_passes_with_one_warning(self, tmp_path: Path, caplog) -> None:
        (tmp_path / ".metadata").write_bytes(b"x")
        assert validation.validate(tmp_path / ".metadata")
        assert validation.validate(tmp_path / ".metadata")
        assert len([r for r in caplog.records if "unverified" in r.message]) == 1

    def test_composer_finds_it_by_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from composer.utils.checkpoint import _ensure_valid_checkpoint

        folder = make(tmp_path / "ep0-ba3")
        monkeypatch.setenv("CHECKPOINT_VALIDATION_FUNCTION", "llmtrain.checkpoint.validation.validate")
        assert _ensure_valid_checkpoint(str(folder / ".metadata"), None)
        flip(folder / "__0_0.distcp", 5)
        with pytest.raises(ValueError, match="is invalid"):
            _ensure_valid_checkpoint(str(folder / "__0_0.distcp"), [(0, 4)])
