"""A rank below torchrun: `python -m llmtrain.launching.rank RECIPE [key=value ...]`.

It is `llmtrain.training.command`, and what torchrun leaves undone: torchrun restarts ranks whatever their exit code
was. So a rank that ends for a reason that comes again leaves its exit code in a file, and ranks that are started after
it end at once, before any import.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llmtrain.launching.plan import VERDICT
from llmtrain.training import exit_codes

ELASTIC = "LLMTRAIN_ELASTIC"
"""Environment variable: hosts may come and go, so a number of ranks that does not fit may change."""


def main(arguments: Sequence[str]) -> int:
    """Trains, unless an earlier start of this launch has shown that it is pointless."""
    if (code := _earlier_verdict()) is not None:
        if os.environ.get("LOCAL_RANK") == "0":
            print(f"launch      not again: exit code {code} would come again", file=sys.stderr, flush=True)
        return code
    if os.environ.get(ELASTIC):
        _wait_for_a_number_that_fits(arguments)
    from llmtrain.training.command import main as train

    code = train(arguments)
    _keep_verdict(code)
    return code


def _earlier_verdict() -> int | None:
    path = os.environ.get(VERDICT)
    if not path:
        return None
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        # What is left is of this launch: where the ranks of another host have failed, torchrun starts those of this
        # one again and does not count that.
        _forget_verdict(Path(path))
    try:
        code = int(Path(path).read_text())
    except (OSError, ValueError):
        return None
    return code if code in exit_codes.POINTLESS else None


def _forget_verdict(path: Path) -> None:
    """Removes that of an earlier launch (torchrun started by hand), which later starts of this one would obey."""
    import psutil  # type: ignore[import-untyped]

    try:
        if path.stat().st_mtime < psutil.Process(os.getppid()).create_time():
            path.unlink(missing_ok=True)
    except (OSError, psutil.Error):
        pass  # there is none; or it is gone by now


def _keep_verdict(code: int) -> None:
    path = os.environ.get(VERDICT)
    if not path or code not in exit_codes.POINTLESS:
        return
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(str(code))
        temporary.replace(path)
    except OSError:
        pass  # then it is restarted for nothing, which does no harm


def _wait_for_a_number_that_fits(arguments: Sequence[str]) -> None:
    """Where so many ranks cannot share the batch: waits for torchrun to end this one, as it does for a new host."""
    from llmtrain.errors import UserError
    from llmtrain.recipe.batch import batch_plan
    from llmtrain.recipe.load import load_recipe

    given = [argument for argument in arguments if not argument.startswith("--")]
    try:
        recipe = load_recipe(given[0], given[1:])
    except UserError:
        return  # said in a moment
    try:
        batch_plan(recipe, int(os.environ["WORLD_SIZE"]))
    except UserError as error:
        if os.environ.get("RANK") == "0":
            print(f"launch      waiting for another number of hosts: {error}", file=sys.stderr, flush=True)
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(1)
        sys.exit(exit_codes.LOST_CONTACT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
