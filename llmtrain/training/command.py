"""The command `train`: from arguments to an exit code."""

import os
import sys
from collections.abc import Sequence

from llmtrain.errors import UserError

USAGE = "usage: composer [-n RANKS] train.py RECIPE.yaml [key=value ...]"


def main(arguments: Sequence[str]) -> int:
    """Trains the recipe named by the first argument, with the others as overrides.

    Returns:
        0: finished, or was finished already. 2: a mistake in the recipe or its surroundings. 143: stopped by SIGTERM.
    """
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        print(USAGE, file=sys.stderr)
        return 2
    # Before training starts all ranks of a node fail the same way, and one of them says why.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if os.environ.get("RANK", "0") == "0":
            print(f"start       {arguments[0]}: importing torch and Composer", file=sys.stderr, flush=True)
        from llmtrain.recipe.load import load_recipe

        recipe = load_recipe(arguments[0], arguments[1:])

        from llmtrain.training.train import train

        return train(recipe)
    except UserError as error:
        if error.rank is not None:
            print(f"error (rank {error.rank}): {error}", file=sys.stderr, flush=True)
        elif speaks:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
