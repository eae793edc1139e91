"""The trial of a recipe: a run that nobody disturbs, one that is killed again and again, one whose ranks change."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import llmtrain
from llmtrain.certify.certificate import Certificate
from llmtrain.certify.compare import (
    TOLERANCE,
    Difference,
    compare_all_steps,
    compare_checkpoints,
    compare_evaluations,
    compare_steps,
    largest_loss_difference,
    last_checkpoint,
)
from llmtrain.certify.plan import Plan, Point
from llmtrain.certify.segment import Segment, Starter, Timing
from llmtrain.certify.subject import Subject, without_dropout
from llmtrain.certify.workspace import Workspace
from llmtrain.errors import UserError
from llmtrain.training.step_record import STEPS, read_steps
from llmtrain.trust import VARIABLE as TRUST

LINES_OF_A_FAILURE = 30

Tick = Callable[[str, int, int], None]
"""What is going on, kills done, last finished step."""


@dataclass(frozen=True)
class Options:
    """What to try.

    Attributes:
        ranks: of the run.
        kills: of it.
        seed: decides the kill points.
        other_ranks: numbers of ranks to go on with; empty for none.
    """

    ranks: int = 2
    kills: int = 20
    seed: int = 0
    other_ranks: tuple[int, ...] = (1, 4)


class Failed(Exception):  # no mistake of the program
    """The trial is over: something is not the same, or a run did not get to its end."""


class Trial:
    """Trains a recipe again and again, and fills in a certificate.

    Args:
        what: the recipe.
        options: what to try.
        place: where the runs go.
        tick: is told how far it has come.
    """

    def __init__(self, what: Subject, options: Options, place: Workspace, tick: Tick) -> None:
        self.what = what
        self.options = options
        self.place = place
        self.timing = Timing()
        self._tick = tick
        self._doing = ""
        self.certificate = Certificate(
            recipe=what.name,
            command={
                "ranks": options.ranks,
                "kills": options.kills,
                "seed": options.seed,
                "steps": what.steps,
                "other_ranks": list(options.other_ranks),
            },
            changes=what.changes,
            versions=_versions(what.on_gpu),
        )

    def run(self) -> Certificate:
        """All of it, up to the first difference.

        Raises:
            UserError: the recipe does not train, or the run is over before it could be killed.
        """
        started = time.monotonic()
        try:
            whole = self.undisturbed("whole", self.what.data)
            self.killed(whole)
            self.elastic(whole)
        except Failed:
            pass
        finally:
            self.certificate.seconds = time.monotonic() - started
        return self.certificate

    def undisturbed(self, name: str, data: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Train from the start to the end; the rows of its record by step."""
        self._doing = "undisturbed run"
        self._tick(self._doing, 0, 0)  # the first start takes as long as all imports
        segment = self._starter(name, data).start(self.options.ranks, _always(None))
        if segment.failed:
            raise UserError(f"the recipe does not train; its run said:\n{_end_of(segment.output)}")
        if len(segment.rows) != self.what.steps:
            raise UserError(
                f"{len(segment.rows)} of {self.what.steps} steps were recorded: the run ended early. "
                f"It said:\n{_end_of(segment.output)}"
            )
        if not all(samples for row in segment.rows for samples in row["samples"]):
            raise UserError(
                "its batches do not say which samples they are made of (key `sample_id`), so that the order of the "
                "data cannot be compared. A loader of your own has to give it (llmtrain/data/batch.py)."
            )
        self.certificate.losses[name] = _losses(segment.rows)
        return {int(row["step"]): row for row in segment.rows}

    def killed(self, whole: dict[int, dict[str, Any]]) -> None:
        """Train with kills until all have been; in a run after the other, where one ends before."""
        plan = Plan(self.options.seed, self.options.kills, self.what.steps, evaluates=self.what.evaluates)
        number, replayed = 0, 0
        while number == 0 or len(self.certificate.kills) < self.options.kills:
            number += 1
            name = f"killed-{number}"
            starter, points = self._starter(name, self.what.data), len(self.certificate.kills)
            while True:
                self._doing = "killed run" if number == 1 else f"killed run {number}"
                segment = starter.start(self.options.ranks, plan.next)
                replayed += self._checked(segment, whole)
                if segment.kill is None:
                    break
                self.certificate.kills.append(segment.kill)
            self._compare_whole(name, whole)
            if len(self.certificate.kills) == points and self.options.kills:
                raise UserError("the run was over before it could be killed once: give more --steps.")
            if len(self.certificate.kills) < self.options.kills:
                plan = Plan(
                    self.options.seed + number,
                    self.options.kills - len(self.certificate.kills),
                    self.what.steps,
                    evaluates=self.what.evaluates,
                )
        if self.options.kills and not any(self.certificate.resumed):
            self.certificate.problem = (
                "each kill came before the first checkpoint, so nothing was resumed and nothing is proved: "
                "give more --kills or --steps, or another --seed."
            )
            raise Failed
        self.certificate.compared["steps"] = f"{len(whole)}, and {replayed - len(whole) * number} trained again"

    def elastic(self, whole: dict[int, dict[str, Any]]) -> None:
        """Train on one number of ranks after the other; each gives way in the middle of a step."""
        numbers, what = self.options.other_ranks, self.what
        if not numbers:
            return
        if what.elastic_problem is not None:
            self.certificate.elastic_note = f"not tried: {what.elastic_problem} (docs/resume.md)"
            return
        data = without_dropout(what.data, what.dropouts)
        reference = "whole"
        if what.dropouts:
            reference = "whole-without-dropout"
            self.certificate.elastic_note = f"with {', '.join(what.dropouts)} = 0: what is dropped depends on the ranks"
            whole = self.undisturbed(reference, data)
        ranks = [self.options.ranks, *numbers]
        starter, rows = self._starter("elastic", data), list[dict[str, Any]]()
        for index, number in enumerate(ranks):
            self._doing = f"on {number} rank{'s' if number > 1 else ''}"
            after = round(what.steps * (index + 1) / len(ranks))
            point = Point("step", after=after, moment=0.5, stage="begun", rank=None) if index + 1 < len(ranks) else None
            batch = _evaluation_batch(data, self.options.ranks, number)
            segment = starter.start(number, _always(point), batch or ())
            self.certificate.elastic_ranks.append(number)
            self._checked(segment, whole, elastic=True)
            if not segment.rows:
                self.certificate.problem = (
                    f"no step was trained {self._doing}, so nothing is proved of that: more --steps."
                )
                raise Failed
            rows += segment.rows
        self.certificate.losses["elastic"] = _losses(rows)
        self.certificate.largest_loss_difference = largest_loss_difference(whole, rows)
        run = self.place.run("elastic")
        self._refuse(compare_all_steps(whole, read_steps(run / STEPS), elastic=True), "")
        if all(_evaluation_batch(data, self.options.ranks, number) is not None for number in numbers):
            number, difference = compare_evaluations(self.place.run(reference), run, elastic=True)
            self._refuse(difference, "")
            self.certificate.compared["on other ranks"] = (
                f"{len(whole)} global batches; losses and {number} results of evaluations within {TOLERANCE:g}"
            )
        else:
            self.certificate.compared["on other ranks"] = f"{len(whole)} global batches; losses within {TOLERANCE:g}"

    def _checked(self, segment: Segment, whole: dict[int, dict[str, Any]], *, elastic: bool = False) -> int:
        """The number of steps that a start of the run made; they are compared at once."""
        if not elastic:
            if segment.began is not None:
                self.certificate.resumed.append(segment.began)
            self.certificate.losses.setdefault("killed", []).extend(_losses(segment.rows))
        number = len(self.certificate.kills)
        after = f"after kill {number} ({self.certificate.kills[-1].kind})" if number and not elastic else ""
        self._refuse(compare_steps(whole, segment.rows, elastic=elastic), after)
        if segment.failed:
            self.certificate.problem = (
                f"{after or self._doing}: the run ended with exit codes {list(segment.codes)}:\n"
                f"{_end_of(segment.output)}"
            )
            raise Failed
        return len(segment.rows)

    def _compare_whole(self, name: str, whole: dict[int, dict[str, Any]]) -> None:
        first, second = self.place.run("whole"), self.place.run(name)
        self._refuse(compare_all_steps(whole, read_steps(second / STEPS)), "")
        number, difference = compare_evaluations(first, second)
        self._refuse(difference, "")
        compared, difference = compare_checkpoints(last_checkpoint(first), last_checkpoint(second))
        self._refuse(difference, "")
        shown = self.certificate.compared
        shown["tensors of the last checkpoint"] = f"{compared.tensors} ({compared.size / 1e6:,.1f} MB)"
        shown["other values in it"] = str(compared.values)
        shown["results of evaluations"] = str(number)

    def _refuse(self, difference: Difference | None, after: str) -> None:
        if difference is None:
            return
        where = f"{difference.where}, {after}" if after else difference.where
        self.certificate.difference = Difference(where, difference.key, difference.undisturbed, difference.disturbed)
        raise Failed

    def _starter(self, name: str, data: dict[str, Any]) -> Starter:
        environment = {
            "TMPDIR": str(self.place.temporary),
            TRUST: os.environ.get(TRUST, ""),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        if not self.what.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return Starter(
            self.place.write_recipe(name, data),
            self.place.run(name),
            self.place.folder,
            environment,
            self.place.own,
            self.timing,
            lambda step: self._tick(self._doing, len(self.certificate.kills), step),
        )


def _always(point: Point | None) -> Callable[[int, int], Point | None]:
    return lambda began, ranks: point


def _evaluation_batch(data: dict[str, Any], ranks: int, number: int) -> Sequence[str] | None:
    """An override with which `number` ranks evaluate the same rows in a batch as `ranks`; None where none does."""
    size = (data["device_eval_batch_size"] or data["device_train_microbatch_size"]) * ranks
    return None if size % number else [f"device_eval_batch_size={size // number}"]


def _losses(rows: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(int(row["step"]), float.fromhex(next(iter(row["loss"].values()), "nan"))) for row in rows]


def _end_of(output: str) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-LINES_OF_A_FAILURE:])


def _versions(on_gpu: bool) -> dict[str, str]:
    import torch

    names = ("torch", "mosaicml", "mosaicml-streaming", "numpy")
    found = {"llmtrain": llmtrain.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in names}
    return {**found, "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"}
