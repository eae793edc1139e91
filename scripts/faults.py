"""Runs the fault suite and writes the table of docs/reliability.md: python scripts/faults.py [--keep] [for pytest ...].

Each test injects a fault into a real run of two ranks and measures how long it takes until it is named, and until the
run goes on. With --keep, faults that are measured already (in runs/faults/) stay in the table, so a part can be run
again; `--keep --collect-only` only writes the table.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs/reliability.md"
TIMES = REPOSITORY / "runs/faults"
BEGIN, END = "<!-- faults: written by scripts/faults.py -->", "<!-- faults: end -->"


def main(arguments: list[str]) -> int:
    keep = "--keep" in arguments
    rest = [argument for argument in arguments if argument != "--keep"]
    if not keep:
        shutil.rmtree(TIMES, ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "tests/faults", "-q", *rest]
    environment = {**os.environ, "LLMTRAIN_FAULT_TIMES": str(TIMES), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    shown = " ".join(["python scripts/faults.py", *arguments])
    text = PAGE.read_text()
    before, _, after = text.partition(BEGIN)
    _, found, after = after.partition(END)
    if not found:
        raise SystemExit(f"{PAGE}: the markers are not there")
    PAGE.write_text(f"{before}{BEGIN}\n{table(TIMES, shown)}\n{END}{after}")
    return code


def table(folder: Path, command: str) -> str:
    """The table of all faults that were measured, as Markdown."""
    measured = sorted((json.loads(file.read_text()) for file in folder.glob("*.json")), key=lambda one: one["fault"])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "mosaicml", "mosaicml-streaming"))
    lines = [
        f"{len(measured)} faults, measured on {datetime.date.today()} with `{command}`: "
        f"Python {platform.python_version()}, {versions}; {machine()}.",
        "",
        "| fault | what the run does | named after | goes on after | message |",
        "|---|---|---|---|---|",
    ]
    for one in measured:
        on = "" if one["recovered"] is None else f"{one['recovered']:.1f} s"
        cells = [one["fault"], one["outcome"], f"{one['detected']:.1f} s", on, shortened(one["message"])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def shortened(message: str) -> str:
    """The first line, at most 160 characters, as code; without folders of this machine."""
    line = message.splitlines()[0].replace(str(REPOSITORY), "").replace("`", "'")
    line = " ".join(Path(word).name if word.startswith("/") and "/" in word[1:] else word for word in line.split())
    return f"`{line if len(line) <= 160 else line[:157] + '...'}`"


def machine() -> str:
    """In words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GB of memory, no GPU, other work on it: load {os.getloadavg()[1]:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
