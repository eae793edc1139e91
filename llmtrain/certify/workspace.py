"""A folder of its own for the runs of a certificate, in which a recipe finds what it names."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

PREFIX = "certify-"
"""Of the names of runs."""


class Workspace:
    """Looks like the user's working directory through links, but `runs/` is another folder.

    So a recipe's relative paths mean what they mean to the user, runs that it starts from included, and nothing is
    written among these.

    Args:
        folder: made already, empty.
        cwd: the user's working directory.
    """

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.folder = folder
        self.own = folder / ".certify"
        self.temporary = self.own / "tmp"
        self.temporary.mkdir(parents=True)
        self.runs = folder / "runs"
        self.runs.mkdir()
        for entry in cwd.iterdir():
            if entry.name not in ("runs", ".certify") and entry.resolve() != folder.resolve():
                (folder / entry.name).symlink_to(entry.absolute())
        with contextlib.suppress(OSError):
            for entry in (cwd / "runs").iterdir():
                if not entry.name.startswith(PREFIX):
                    (self.runs / entry.name).symlink_to(entry.absolute())

    def run(self, name: str) -> Path:
        """The folder of one of our runs."""
        return self.runs / f"{PREFIX}{name}"

    def write_recipe(self, name: str, data: dict[str, Any]) -> Path:
        """A recipe for one of our runs."""
        path = self.own / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**data, "run_name": f"{PREFIX}{name}"}, sort_keys=False))
        return path


@contextmanager
def workspace(cwd: Path, keep: bool) -> Iterator[Workspace]:
    """One in the folder for temporary files (TMPDIR), removed at the end unless it is kept."""
    folder = Path(tempfile.mkdtemp(prefix="llmtrain-certify-"))
    try:
        yield Workspace(folder, cwd)
    finally:
        if not keep:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Links go, and what they lead to stays. Workers of a killed rank live some seconds longer and may write."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
