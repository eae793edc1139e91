"""``llmtrain compare RUN RUN ...``: runs side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llmtrain.comparison.picture import draw
from llmtrain.comparison.report import as_json, compare, show
from llmtrain.comparison.run import Run, read_run
from llmtrain.errors import UserError

MOST_RUNS = 8
"""More columns would not be read."""


def compare_command(paths: Sequence[Path], *, output: Path | None = None) -> list[Path]:
    """Print tables; with an output also write OUTPUT.json and OUTPUT.png.

    Args:
        paths: folders of runs, finished or going on.
        output: where the files go, without suffix (one of .json or .png is dropped).

    Returns:
        The files that were written.

    Raises:
        UserError: a folder is no run, there are too many, or the output cannot be written.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise UserError(f"compare takes 1 to {MOST_RUNS} runs, not {len(paths)}.")
    runs = [read_run(path) for path in paths]
    _name_apart(runs)
    found = compare(runs)
    console = Console()
    show(console, found)
    if output is None:
        return []
    stem = output.with_suffix("") if output.suffix in (".json", ".png") else output
    if not stem.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {stem.absolute().parent}.")
    written = [stem.with_name(f"{stem.name}.json")]
    temporary = written[0].with_name(f".{written[0].name}")
    temporary.write_text(json.dumps(as_json(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(written[0])
    picture = stem.with_name(f"{stem.name}.png")
    if draw(runs, picture):
        written.append(picture)
    else:
        console.print("No run has a loss yet: there is no picture.")
    console.print(" ".join(map(str, written)), markup=False, highlight=False, soft_wrap=True)
    return written


def _name_apart(runs: Sequence[Run]) -> None:
    """Runs of the same name get as much of their paths as tells them apart; a run that is given twice, a number."""
    paths = {run.path.resolve() for run in runs}
    names = {path: path.name for path in paths}
    for depth in range(2, 9):
        taken = list(names.values())
        names = {path: "/".join(path.parts[-depth:]) if taken.count(n) > 1 else n for path, n in names.items()}
    seen: dict[Path, int] = {}
    for run in runs:
        path = run.path.resolve()
        seen[path] = seen.get(path, 0) + 1
        run.name = names[path] if seen[path] == 1 else f"{names[path]} ({seen[path]})"
