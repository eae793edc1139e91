"""The watchdog of this process, and the callback that tells it how far the run is."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from composer import Callback, Logger, State
from composer.utils import dist

from llmtrain.hf_model.model import HFCausalLM
from llmtrain.model.mpt import MPT
from llmtrain.recipe.recipe import Recipe
from llmtrain.training.agreement import after_each_turn, around_each_exchange, from_all_ranks, from_rank_zero
from llmtrain.training.environment import say
from llmtrain.training.heartbeat import HEARTBEATS, Heartbeats
from llmtrain.training.step_limits import FLOOR, FLOOR_COMPILED, StepLimits, Work
from llmtrain.training.step_times import StepTimes
from llmtrain.training.watchdog import Watchdog

CROWD = 64
"""In runs of more ranks, one of each machine looks at all others; the rest see to those of their own machine."""
ALONE = 6
"""For a rank that nobody waits for, `dist_timeout` means nothing else: it may take so many times that, such as to
download a model or to tokenize a data set."""
_SHARED = ".shared"
_current: Watchdog | None = None
_is_rank = False


def this_process_is_a_rank() -> None:
    """Called by the command `train`: nothing else runs in this process, so a watchdog may end it."""
    global _is_rank
    _is_rank = True


def current() -> Watchdog | None:
    """The watchdog of this process."""
    return _current


def start(recipe: Recipe) -> Watchdog | None:
    """Starts the watchdog of this rank (a collective call).

    Returns:
        None: the recipe has none, or this process is not a rank of its own (a notebook, a test).
    """
    global _current
    if recipe.watchdog is None or not _is_rank or _current is not None:
        return _current
    run = Path("runs") / recipe.run_name
    world = dist.get_world_size()
    first = dist.get_global_rank() - dist.get_local_rank()
    near = range(first, first + dist.get_local_world_size())
    compiles = recipe.compile_config is not None and not recipe.compile_config.disable
    _current = Watchdog(
        _hearts(run),
        run,
        StepLimits(
            recipe.watchdog.step_limit,
            patience=recipe.dist_timeout * (1 if world > 1 else ALONE),
            floor=FLOOR_COMPILED if compiles else FLOOR,
        ),
        rank=dist.get_global_rank(),
        world=world,
        heart_limit=recipe.watchdog.heart_limit,
        ends=True,
        near=near if world > CROWD and dist.get_local_rank() > 0 else None,
    )
    _current.start()
    after_each_turn.append(_current.turned)
    around_each_exchange.append(_current.exchanges)
    return _current


def stop() -> None:
    """At the end of a run that went well."""
    global _current
    if _current is not None:
        after_each_turn.remove(_current.turned)
        around_each_exchange.remove(_current.exchanges)
        _current.stop()
        _current = None


def _hearts(run: Path) -> Heartbeats | None:
    """Heartbeats in the run's folder, if all ranks see the same one; what an earlier launch left there is put aside."""
    folder = run / HEARTBEATS

    def prepare() -> None:
        run.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("failures", "hang"):
            if (run / name).exists():
                shutil.rmtree(run / f"{name}.1", ignore_errors=True)
                with suppress(OSError):
                    (run / name).rename(run / f"{name}.1")
        folder.mkdir()
        (folder / _SHARED).touch()

    from_rank_zero(prepare)
    unseen = [rank for rank, seen in enumerate(from_all_ranks((folder / _SHARED).exists)) if not seen]
    from_rank_zero(lambda: (folder / _SHARED).unlink(missing_ok=True))
    if not unseen:
        return Heartbeats(folder)
    say(
        f"watchdog    rank(s) {unseen} do not see {run}, so ranks cannot tell each other where they are: a hang is "
        "ended, each rank writes its own stacks, and nobody says for whom the run waited"
    )
    return None


class Watch(Callback):  # type: ignore[misc]
    """Tells the watchdog what is begun and what is finished. Stands before all other callbacks.

    Args:
        watchdog: of this process.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._began = time.monotonic()
        self._first_of_epoch = True

    def _begin(self, phase: str, work: Work = "other") -> None:
        self._began = time.monotonic()
        self.watchdog.begins(phase, work)

    def before_load(self, state: State, logger: Logger) -> None:
        self._begin("loading")

    def after_load(self, state: State, logger: Logger) -> None:
        self.watchdog.at_step(int(state.timestamp.batch))
        self._begin("starting")

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._first_of_epoch = True

    def before_dataloader(self, state: State, logger: Logger) -> None:
        # An epoch's first batch waits for workers, for the order of the epoch, for its first shard.
        step = int(state.timestamp.batch) + 1
        self._begin(f"step {step}", "other" if self._first_of_epoch else "step")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if self._first_of_epoch:
            self._first_of_epoch = False
            self._begin(f"step {int(state.timestamp.batch) + 1}", "step")

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        self.watchdog.finished("step", time.monotonic() - self._began)
        self.watchdog.at_step(step)
        self._begin(f"after step {step}")

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._begin(f"after step {int(state.timestamp.batch)}")

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._begin(f"after step {int(state.timestamp.batch)}")

    def eval_start(self, state: State, logger: Logger) -> None:
        self._begin(f"evaluation {state.dataloader_label}")

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        self._began = time.monotonic()
        label = str(state.dataloader_label)
        self.watchdog.begins(f"evaluation {label}", "evaluation", label)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.watchdog.finished("evaluation", time.monotonic() - self._began, str(state.dataloader_label))
        self._begin(f"evaluation {state.dataloader_label}")

    def fit_end(self, state: State, logger: Logger) -> None:
        self._begin("closing")


def watch_callbacks(recipe: Recipe, model: MPT | HFCausalLM) -> list[Callback]:
    """What tells the watchdog of this process how far the run is, if there is one; and what measures steps.

    Args:
        recipe: the recipe.
        model: whose blocks are timed.
    """
    if recipe.watchdog is None:
        return []
    blocks = (module for module in model.modules() if model.activation_checkpointing_fn(module))
    return [*([Watch(_current)] if _current is not None else []), StepTimes(recipe.watchdog, blocks)]
