import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmtrain.errors import UserError
from llmtrain.prep.disk import disk_problems
from llmtrain.prep.run import Options

COMMAND = [str(Path(sys.executable).parent / "llmtrain"), "prep"]


@contextmanager
def small_disk(folder, size, *options):
    """A file system of its own, where that may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_named_and_the_rerun_goes_on(corpus, digest, tmp_path, processes):
    expected = corpus.reference(compression=None)
    with small_disk(tmp_path / "disk", "700k") as disk:
        made = {"compression": None, "out": str(disk / "out")}
        with pytest.raises(UserError, match=rf"{disk}: No space left on device \([\d.]+ MB are free there\). .*again"):
            corpus.make(Options(processes=processes), **made)
        assert not (disk / "out").exists()
        done = list((disk / ".out.partial/.work/done/tokens").iterdir())
        assert done
        assert not list((disk / ".out.partial/.work/tmp").iterdir())  # what was half done does not fill it further
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        _, said = corpus.make(Options(processes=processes), **made)
        assert f"going on: {len(done)} of 20" in said
        assert digest(disk / "out") == expected


def test_a_file_size_limit_is_named(corpus):
    """`ulimit -f`, and quotas that say EFBIG."""
    limit = 30_000
    done = subprocess.run(
        [*COMMAND, str(corpus.file(compression=None, size_limit=100_000)), "--processes", "1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert f"{corpus.folder}: File too large (" in done.stderr
    assert "Traceback" not in done.stderr
    assert not corpus.out.exists()
    assert not corpus.partial.exists()  # nothing was finished


def test_a_read_only_disk_is_named(corpus, tmp_path):
    said = r"disk.* cannot be written: Read-only file system.*another `out`"
    with small_disk(tmp_path / "disk", "1m", "ro") as disk, pytest.raises(UserError, match=said):
        corpus.make(out=str(disk / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(corpus, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"closed.* cannot be written: Permission denied.*another `out`"):
        corpus.make(out=str(folder / "out"))


def test_out_below_a_file_is_named(corpus):
    with pytest.raises(UserError, match=r"0\.jsonl.*Not a directory"):
        corpus.make(out=str(corpus.files[0] / "out"))


def test_errors_about_other_files_pass(tmp_path):
    with pytest.raises(PermissionError), disk_problems(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "input.txt"))
    with pytest.raises(UserError, match="cannot be written"), disk_problems(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out" / "x"))
