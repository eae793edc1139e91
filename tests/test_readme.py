"""The README tells the truth: its commands exist, its example prints what it shows, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("llmtrain")
]


def llmtrain(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from llmtrain.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_example_of_mistakes_is_what_is_printed(repository: Path) -> None:
    block = next(block for block in BLOCKS if block.startswith("$ llmtrain check"))
    command, _, shown = block.partition("\n")
    done = llmtrain(shlex.split(command)[2:], repository)
    assert done.returncode == 2
    assert done.stdout + done.stderr == shown


# `make train` runs prep, train, export and generate (test_make_train.py); the rest is run here.
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in ("check", "schema")])
def test_command_runs(command: str, repository: Path) -> None:
    done = llmtrain(shlex.split(command.split(">")[0])[1:], repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] == "launch"])
def test_launch_says_what_it_would_run(command: str, repository: Path) -> None:
    done = llmtrain([*shlex.split(command)[1:], "--print"], repository)
    assert done.returncode == 0, done.stderr
    assert "composer" in done.stdout
    assert "yamls/mpt-tiny.yaml" in done.stdout


def test_every_verb_exists(repository: Path) -> None:
    help_text = llmtrain(["--help"], repository).stdout
    for command in COMMANDS:
        assert f" {command.split()[1]} " in help_text, command


def test_every_file_that_it_names_exists(repository: Path) -> None:
    named = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"`((?:yamls|data_prep|docs)/[\w./-]+)`", README)
    assert len(named) > 8
    for name in named:
        assert (repository / name).exists(), name


def test_docs_link_to_files_that_exist(repository: Path) -> None:
    for page in [*(repository / "docs").glob("*.md"), repository / "data_prep/README.md"]:
        for link in re.findall(r"\]\(([\w./-]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
