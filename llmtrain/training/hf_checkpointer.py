"""Exports while training goes on: it waits for the copy out of the device, and for nothing else."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Event, Logger, State
from composer.callbacks.checkpoint_saver import create_interval_scheduler
from composer.utils import dist

from llmtrain.checkpoint.resolve import checkpoints_in
from llmtrain.recipe.recipe import Recipe
from llmtrain.redaction import redact
from llmtrain.training.agreement import from_rank_zero, from_rank_zero_in_turns
from llmtrain.training.background_export import BackgroundExport
from llmtrain.training.environment import say
from llmtrain.training.export_place import ExportPlace
from llmtrain.training.gather import Gathered, gather, memory_line, memory_of_an_export
from llmtrain.training.last_mile import destinations, exercise
from llmtrain.training.preemption import Preempted
from llmtrain.training.resume import save_folder as checkpoints_of

PATIENCE = 7200.0
"""Seconds that a training waits for an export before it goes on without it."""
_TURN = 5.0
"""Seconds between collectives while all ranks wait for an export: far below `dist_timeout`."""


class HuggingFaceCheckpointer(Callback):  # type: ignore[misc]
    """Exports every so often, and at the end of the training, in a process of its own on rank 0.

    Weights are gathered from their shards tensor by tensor; rank 0 copies each into memory that the process maps. The
    process writes, proves and renames as `llmtrain export` does. One runs at a time. An export that fails does not
    stop the training; it is told at once, and again at the end of the run, which then exits with 1.

    Args:
        save_folder: exports go to `save_folder/huggingface/NAME`; a URL is pushed to.
        save_interval: Composer time string, e.g. `1000ba`.
        huggingface_folder_name: NAME, with Composer's placeholders.
        precision: dtype of the weights that are written.
        overwrite: replace what an earlier run exported under the same name.
        with_code: put our modelling file beside the weights where no class of transformers computes the model.
        push: where each export is copied to as well.
        flatten_imports: means nothing.
    """

    def __init__(
        self,
        save_folder: str,
        save_interval: str | int,
        huggingface_folder_name: str = "ba{batch}",
        precision: str = "float32",
        overwrite: bool = True,
        with_code: bool = False,
        push: str | None = None,
        flatten_imports: tuple[str, ...] = ("llmfoundry",),
    ) -> None:
        self.precision, self.overwrite, self.with_code = precision, overwrite, with_code
        self._given = (save_folder, huggingface_folder_name, push)
        self._is_due = create_interval_scheduler(save_interval)
        self._last: int | None = None
        self._running: BackgroundExport | None = None
        self._unfinished: list[dict[str, Any]] = []
        self._stall = 0.0
        self.failures: list[str] = []
        """What went wrong, on rank 0."""

    def attach(
        self, recipe: Recipe, run: Path, tokenizer_fingerprint: str | None, stop_asked: Callable[[], bool]
    ) -> None:
        """What it needs to know of the run; called before the training.

        Args:
            recipe: the run's.
            run: its folder.
            tokenizer_fingerprint: of its tokenizer.
            stop_asked: whether this rank has received SIGTERM.
        """
        self._recipe = recipe
        self.place = ExportPlace.of(*self._given, recipe.run_name, run)
        self.run, self._checkpoints, self._stop_asked = run, checkpoints_of(recipe), stop_asked
        self._record = {
            "recipe": redact(recipe.model_dump(mode="json")),
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }

    def state_dict(self) -> dict[str, Any]:
        """The exports that were not finished when a checkpoint was saved: a resumed run makes them up.

        As one text: torch's sharded checkpoints load lists only where there is one of the same length.
        """
        return {"unfinished": json.dumps(self._unfinished)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unfinished = json.loads(state.get("unfinished", "[]"))

    def fit_start(self, state: State, logger: Logger) -> None:
        """Tries an export of tiny weights and all destinations, and makes up the exports that a stop has cut off.

        Raises:
            UserError: it would fail later, or another run's stand there and may not be replaced.
        """
        step = int(state.timestamp.batch)
        from_rank_zero(lambda: self.place.prepare(fresh=step == 0, overwrite=self.overwrite))
        for line in from_rank_zero(lambda: exercise(self._recipe, self.run / "tokenizer")):
            say(line)
        for line in from_rank_zero_in_turns(lambda: destinations(self._recipe), _TURN):
            say(line)
        need = memory_of_an_export(state.model, self.precision)
        say(from_rank_zero(lambda: memory_line(need)))
        cut_off, self._unfinished = self._unfinished, []
        for export in cut_off:
            if export["step"] == step:
                self.export(state)
            else:
                self._make_up(**export)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._running is not None and self._running.ended():
            self._report()
        if self._is_due(state, Event.BATCH_CHECKPOINT):
            self.export(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.EPOCH_CHECKPOINT):
            self.export(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Exports what has not been exported yet, and waits.

        Raises:
            Preempted: on all ranks: SIGTERM came while they waited.
        """
        if int(state.timestamp.batch) > 0:
            self.export(state)
        if not self._wait("before the run ends"):
            raise Preempted

    def close(self, state: State, logger: Logger) -> None:
        """Ends a process that still runs: after a stop or a mistake."""
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            _say(f"export      {self._running.target} was stopped; a resumed run makes it up where it can")
            self._running.stop()
            self._running = None

    def export(self, state: State) -> None:
        """Copies the weights now, on all ranks (a collective call), and has them written in the background."""
        step, epoch = int(state.timestamp.batch), int(state.timestamp.epoch)
        if self._last == step:
            return
        self._last = step
        name = self.place.name(state.run_name, state.timestamp)
        going_on = self._wait("before the next one is copied")
        self._unfinished.append({"step": step, "name": name})
        if not going_on:  # a checkpoint of this very step is about to be saved, and the resumed run exports it
            return
        started = time.monotonic()
        background, snapshot, problem = None, None, None
        if dist.get_global_rank() == 0:
            background = BackgroundExport()
            try:
                snapshot = background.checkpoint(self.run, f"ep{epoch}-ba{step}")
            except OSError as error:  # told with the others' knowledge: they must not wait for this rank
                problem = f"{name}: no place for its files ({error}); TMPDIR names another"
        gathered = gather(state.model, self.precision, snapshot, problem)
        self._stall = time.monotonic() - started
        seal = {**self._record, "step": step, "tokens": int(state.timestamp.token)}
        self._start(background, gathered, name, source=str(snapshot), seal=seal)

    def _start(self, background: BackgroundExport | None, gathered: Gathered | None, name: str, **request: Any) -> None:
        """Starts the process on rank 0."""
        if background is None:
            return
        self._running = background
        background.target = self.place.folder / name
        try:
            if gathered is not None and gathered.problem is not None:
                raise ValueError(gathered.problem)
            background.start(
                gathered.snapshot if gathered is not None else None,
                target=str(background.target.absolute()),
                dtype=self.precision,
                overwrite=self.overwrite,
                with_code=self.with_code,
                push=self.place.destinations(name),
                keep=self.place.keep,
                run=self._recipe.run_name,
                **request,
            )
        except (OSError, ValueError) as error:
            if gathered is not None:
                gathered.close()
            self._failed(str(error))
            self._unfinished = [one for one in self._unfinished if one["name"] != name]
            background.stop()
            self._running = None

    def _make_up(self, step: int, name: str) -> None:
        """Exports a checkpoint of the run, in place of the weights that were cut off with the process."""
        self._wait("before the next one begins")
        if dist.get_global_rank() > 0 or self._checkpoints is None:
            return
        try:
            known = checkpoints_in(self._checkpoints)
        except OSError as error:  # the other ranks do not know of it, and go on
            self._failed(f"{name} was cut off by the stop, and {self._checkpoints} cannot be read: {error}")
            return
        for info in known:
            if info.step == step and info.problem is None:
                self._stall = 0.0
                self._unfinished.append({"step": step, "name": name})
                self._start(BackgroundExport(), None, name, source=str(info.path.absolute()))
                return
        _say(f"export      {name} was cut off by the stop, and there is no checkpoint of its step to make it up from")

    def _wait(self, why: str) -> bool:
        """All ranks wait for the export that is under way (a collective call); False: SIGTERM has stopped it."""
        said = False
        while True:
            ended = self._running is None or self._running.ended(_TURN if said else 0.0)
            flags = torch.tensor([int(not ended), int(self._stop_asked())], dtype=torch.int32)
            flags = flags.to(_collective_device())
            dist.all_reduce(flags, reduce_operation="MAX")
            running, stop = flags.tolist()
            if not running:
                self._report()
                return not stop
            if self._running is not None and self._running.waited > PATIENCE:
                # Such as a push over a connection that stands still; the next turn reports it.
                self._running.give_up(f"{self._running.target}: not done after {PATIENCE / 60:.0f} minutes of waiting")
            if stop:
                self._stop()
                return False
            if not said and self._running is not None:
                _say(f"export      waiting for {self._running.target} {why}")
            said = True

    def _report(self) -> None:
        """What became of the export that has ended; on rank 0, the others only forget it."""
        running, self._running = self._running, None
        if dist.get_global_rank() > 0:
            self._unfinished = []
        if running is None:
            return
        answer = running.answer()
        self._unfinished = [one for one in self._unfinished if one["name"] != running.target.name]
        if answer.problem is not None:
            self._failed(answer.problem)
            return
        waited = f"training waited {self._stall:.2f} s for the copy"
        waited += f" and {running.waited:.1f} s for this to end" if running.waited >= 0.05 else ""
        what = "is there already" if answer.done_before else f"({answer.size / 1e6:,.1f} MB, proven; "
        what += f"; {waited}" if answer.done_before else f"{answer.seconds:.1f} s in the background; {waited})"
        _say(f"export      {running.target}  {what}")

    def _failed(self, problem: str) -> None:
        self.failures.append(problem)
        _say(f"export      FAILED; training goes on. {problem}")


def _collective_device() -> torch.device:
    on_gpu = torch.cuda.is_available() and torch.distributed.is_initialized()
    on_gpu = on_gpu and "nccl" in torch.distributed.get_backend()
    return torch.device("cuda" if on_gpu else "cpu")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def exporters(callbacks: Iterable[Any]) -> list[HuggingFaceCheckpointer]:
    """Those among a run's callbacks."""
    return [one for one in callbacks if isinstance(one, HuggingFaceCheckpointer)]


def failed_exports(callbacks: Iterable[Any]) -> int:
    """The exit code that exports leave a run with, told once (a collective call): 1 if one failed, else 0."""
    failures = from_rank_zero(lambda: [problem for one in exporters(callbacks) for problem in one.failures])
    if failures and dist.get_global_rank() == 0:
        _say(f"error: {len(failures)} export(s) failed (the training itself is complete, and its checkpoints are):")
        for problem in failures:
            _say(f"  {problem}")
        _say("`llmtrain export CHECKPOINT OUT` makes them from checkpoints.")
    return 1 if failures else 0
