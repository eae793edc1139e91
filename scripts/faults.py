"""Runs the fault suite and writes the table of docs/reliability.md: python scripts/faults.py [--keep] [for pytest ...].

Each test injects a fault into a real run of two ranks and measures how long it takes until it is named, and until the
run goes on. What was measured lies in runs/faults/. With --keep it stays, so the suite can be run in parts:
`--keep -k disk`; `--keep --collect-only` only writes the table. Its end is 1, too, when a kind of fault is missing.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmtrain.testing.faults import FAULT_TIMES, KINDS, LIMIT, kind_of

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs/reliability.md"
TIMES = REPOSITORY / "runs/faults"
TESTS = ("tests/faults", "tests/launching/test_two_hosts.py")
NOT_MEASURED = "**Not measured for this table:**"
BEGIN, END = "<!-- faults: written by scripts/faults.py -->", "<!-- faults: end -->"


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    keep = "--keep" in arguments
    rest = [argument for argument in arguments if argument != "--keep"]
    if not keep:
        shutil.rmtree(TIMES, ignore_errors=True)
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-m", "long or not long", *rest]
    environment = {**os.environ, FAULT_TIMES: str(TIMES), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=REPOSITORY, env=environment).returncode
    measured = [json.loads(file.read_text()) for file in TIMES.glob("*.json")]
    PAGE.write_text(with_table(PAGE.read_text(), table(measured)))
    if lacking := missing(one["fault"] for one in measured):
        print(f"not measured: {', '.join(lacking)}", file=sys.stderr)
    return code or int(bool(lacking))


def with_table(page: str, text: str) -> str:
    """The page with another table.

    Raises:
        SystemExit: it has no place for one.
    """
    before, begin, after = page.partition(BEGIN)
    _, end, after = after.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name}: the markers of the table are not there")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def missing(faults: Any) -> list[str]:
    """Kinds of faults that none of these is of."""
    found = {kind_of(fault) for fault in faults}
    return [kind for index, kind in enumerate(KINDS) if index not in found]


def table(measured: Sequence[dict[str, Any]]) -> str:
    """The table of all faults that were measured, as Markdown."""
    rows = sorted(measured, key=lambda one: (kind_of(one["fault"]), one["fault"]))
    lines = [
        heading(rows),
        "",
        "| fault | what the run does | named after | goes on after | message |",
        "|---|---|---|---|---|",
    ]
    for one in rows:
        on = "" if one["recovered"] is None else f"{one['recovered']:.1f} s"
        cells = [one["fault"], one["outcome"], f"{one['detected']:.1f} s", on, shortened(one["message"])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if lacking := missing(one["fault"] for one in rows):
        lines += ["", f"{NOT_MEASURED} {', '.join(lacking)}."]
    return "\n".join(lines)


def heading(rows: Sequence[dict[str, Any]]) -> str:
    """When, with what and under which load."""
    if not rows:
        return "Nothing was measured."
    dates = sorted({one["date"] for one in rows})
    loads = sorted(one["load"] for one in rows)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "mosaicml", "mosaicml-streaming"))
    return (
        f"{len(rows)} faults, each of them named (or got over) within {LIMIT:.0f} s, measured on "
        f"{' and '.join(dates)} with `python scripts/faults.py`: Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} cores, {memory:.0f} GB of memory, no GPU. Its own work included, the load was "
        f"{loads[0]:.0f} to {loads[-1]:.0f}, {loads[len(loads) // 2]:.0f} in the middle."
    )


def shortened(message: str) -> str:
    """The first line, at most 160 characters, as code; without folders of this machine."""
    line = message.splitlines()[0].replace(str(REPOSITORY), "").replace("`", "'")
    line = " ".join(Path(word).name if word.startswith("/") and "/" in word[1:] else word for word in line.split())
    return f"`{line if len(line) <= 160 else line[:157] + '...'}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
