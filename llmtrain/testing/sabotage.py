"""A `code_paths` file that spoils some steps of a real run, and kills it at given points."""

from collections.abc import Sequence
from pathlib import Path

_CODE = """
import math
import os
import signal
import sys
import weakref
from pathlib import Path

from llmtrain.data.batch import sample_ids
from llmtrain.training import rewinding, skipped_steps
from llmtrain.training.bad_steps import BadSteps
from llmtrain.training.first_not_finite import plain_name
from llmtrain.training.language_model import LanguageModel

WHERE = {where!r}
now = {{"step": 0, "ids": None, "spoils": False, "hooked": False}}
before_forward, forward = BadSteps.before_forward, LanguageModel.forward
models = weakref.WeakSet()


def kill(point):
    marker = Path(WHERE["file"]).with_suffix(f".{{point}}-{{os.environ['RANK']}}")
    if point in WHERE["kills"] and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def killing(point, function):
    def call(*args, **kwargs):
        kill(point)
        return function(*args, **kwargs)

    return call


def note(self, state, logger):
    before_forward(self, state, logger)
    now["step"] = int(state.timestamp.batch) + 1
    kill(f"step-{{now['step']}}")
    if WHERE["steps"][0] <= now["step"] <= WHERE["steps"][1] and WHERE["rank"] in (None, int(os.environ["RANK"])):
        if WHERE["micro_batch"] in (None, len(self._seen)):
            now["ids"] = sample_ids(state.batch)  # found again when the micro-batch is run again


def spoil(module, args, output):
    if not now["spoils"]:
        return None
    if WHERE["what"] == "output":
        return output * math.nan
    output.register_hook(lambda gradient: gradient * math.nan)
    return None


def spoiled(self, batch):
    if not now["hooked"]:
        now["hooked"] = True
        for name, module in self.named_modules():
            if name and plain_name(name) == WHERE["module"]:
                module.register_forward_hook(spoil)
    now["spoils"] = self.training and now["ids"] == sample_ids(batch)
    output = forward(self, batch)
    if now["spoils"] and WHERE["what"] == "loss":
        output = output._replace(loss=output.loss * WHERE["factor"], loss_sum=output.loss_sum * WHERE["factor"])
    return output


def fresh(self, *args, **kwargs):
    init(self, *args, **kwargs)
    now["hooked"] = False
    models.add(self)
    print(f"models in memory: {{len(models)}}", file=sys.stderr, flush=True)


rewinding.let_go = killing("decided", rewinding.let_go)
skipped_steps.read_best = killing("set-aside", skipped_steps.read_best)
init = LanguageModel.__init__
LanguageModel.__init__ = fresh
BadSteps.before_forward = note
LanguageModel.forward = spoiled
"""


def sabotage(
    file: Path,
    what: str = "nothing",
    step: int = 0,
    *,
    last_step: int | None = None,
    module: str = "",
    rank: int | None = None,
    micro_batch: int | None = None,
    factor: float = 5.0,
    kills: Sequence[str] = (),
) -> Path:
    """Writes the file.

    Args:
        file: where it goes.
        what: `output` (of a module: NaN), `gradient` (of the module's output: NaN), `loss` (times `factor`), `nothing`.
        step: at which training step, from 1.
        last_step: and up to this one.
        module: name of the module.
        rank: on which rank; None is all.
        micro_batch: in which micro-batch of the step, from 1; None is each.
        factor: for `loss`.
        kills: points at which a rank kills itself, once each: `step-N` (as it begins), `decided` (to go back),
            `set-aside` (rank 0 is about to set checkpoints aside).
    """
    where = {
        "what": what,
        "steps": (step, last_step or step),
        "module": module,
        "rank": rank,
        "micro_batch": micro_batch,
        "factor": factor,
        "kills": tuple(kills),
        "file": str(file),
    }
    file.write_text(_CODE.format(where=where))
    return file
