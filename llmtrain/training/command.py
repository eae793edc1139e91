"""The command `train`: from arguments to an exit code."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.garbage import importing
from llmtrain.launching.node_rank import complete_environment
from llmtrain.redaction import redact_output
from llmtrain.training import interruption
from llmtrain.training.exit_codes import USER_ERROR
from llmtrain.trust import require_all, take_flag

USAGE = "usage: composer [-n RANKS] train.py RECIPE.yaml [--trust-code] [key=value ...]"


def main(arguments: Sequence[str]) -> int:
    """Trains the recipe named by the first argument, with the others as overrides.

    Returns:
        One of `llmtrain.training.exit_codes`.
    """
    complete_environment()
    redact_output()
    arguments = take_flag(arguments)
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        print(USAGE, file=sys.stderr)
        return USER_ERROR
    with interruption.ends_this_process():
        return _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    # Before training starts all ranks of a node fail the same way, and one of them says why.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    recipe = None
    try:
        if os.environ.get("RANK", "0") == "0":
            print(f"start       {arguments[0]}: importing torch and Composer", file=sys.stderr, flush=True)
        with importing():
            from llmtrain.recipe.load import load_recipe

        loaded = load_recipe(arguments[0], arguments[1:])
        require_all(loaded.model_dump(mode="json"))
        recipe = loaded  # from here on ranks may differ in what goes wrong

        with importing():
            from llmtrain.training import watching
            from llmtrain.training.train import train

        interruption.leave_it_to_the_thread()
        watching.this_process_is_a_rank()
        code: int = train(recipe)
        watching.stop()
        return code
    except UserError as error:
        if error.rank is None:
            if speaks:
                print(f"error: {error}", file=sys.stderr, flush=True)
            if recipe is not None:
                _tell_peers(str(error))
            return USER_ERROR
        if recipe is None:
            raise
        failure: Exception = error
    except Exception as error:
        if recipe is None:
            raise
        failure = error
    from llmtrain.training.failures import report

    return report(failure, Path("runs") / recipe.run_name)


def _tell_peers(cause: str) -> None:
    """Where this rank alone has failed, the others wait for it; they say so, and that starting again is pointless."""
    from llmtrain.training import watching

    if (watchdog := watching.current()) is not None:
        watchdog.failed(cause, USER_ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
