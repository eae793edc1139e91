"""Going back to an earlier checkpoint, in the processes that are training."""

import atexit
import gc
from pathlib import Path

from composer import Trainer
from composer.core import Engine

from llmtrain.recipe.recipe import Recipe
from llmtrain.training import resume, skipped_steps
from llmtrain.training.agreement import from_rank_zero
from llmtrain.training.environment import say


def finish(recipe: Recipe) -> None:
    """Sets aside what a rewind leaves behind, also one that a kill has interrupted (a collective call).

    Raises:
        UserError: the checkpoint that it goes back to is gone.
    """
    run, folder = Path("runs") / recipe.run_name, resume.save_folder(recipe)
    names = from_rank_zero(lambda: skipped_steps.finish(run, folder))
    if names and folder is not None:
        say(f"spike       set aside in {folder / skipped_steps.SET_ASIDE}: {', '.join(names)}")


def starting_point(recipe: Recipe) -> resume.StartingPoint:
    """Where a run that goes back starts, whatever the recipe says of a run's own checkpoints (a collective call)."""
    finish(recipe)
    return resume.find(recipe.model_copy(update={"autoresume": True, "save_overwrite": False}))


def let_go(trainer: Trainer) -> None:
    """Ends a trainer so that a second one finds room; called where nothing else refers to it."""
    trainer.close()
    # Composer registers each trainer for the end of the process, so that its model would stay in memory until then.
    atexit.unregister(Engine._close)


def collect() -> None:
    """Frees what the trainer that was let go has held: modules and their hooks refer to each other."""
    gc.collect()
