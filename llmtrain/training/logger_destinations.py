"""Composer's loggers, with what they need to work today.

The workarounds stand here, each with what would let it go.
"""

import contextlib
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from composer import Logger, State
from composer.loggers import (
    FileLogger,
    InMemoryLogger,
    LoggerDestination,
    MLFlowLogger,
    TensorboardLogger,
    WandBLogger,
)
from composer.utils import format_name_with_dist

from llmtrain.redaction import redact, redact_arguments

_SHOWN = {"config", "notes", "tags", "name", "group", "job_type"}
"""What `wandb.init` takes and shows."""


class WandB(WandBLogger):  # type: ignore[misc]
    """Weights & Biases; a resumed run goes on in the same W&B run, and a run outlives W&B.

    W&B has a process of its own. A scheduler's SIGTERM to all processes ends it, also where it was started with the
    signal blocked, and each call to it fails from then on: the rank would end of that, in place of saving.

    Composer calls `Run.get_url()`, which wandb removed (0.31 has the property `url`). It can go when Composer allows
    wandb >= 0.19.

    Args:
        folder: The run's folder, for W&B's files and the identity of its run.
        settings: WandBLogger's.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._folder = folder

    def init(self, state: State, logger: Logger) -> None:
        """Starts the W&B run, or goes on with the one that this folder has."""
        import wandb

        if not hasattr(wandb.Run, "get_url"):
            wandb.Run.get_url = lambda run: run.url
        if self._enabled:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._init_kwargs.setdefault("dir", str(self._folder))
            if self._rank_zero_only and "id" not in self._init_kwargs:
                self._init_kwargs.update(id=_run_id(self._folder / WANDB_RUN_ID), resume="allow")
        for key in _SHOWN & self._init_kwargs.keys():
            self._init_kwargs[key] = redact(self._init_kwargs[key])
        given = sys.argv
        try:
            sys.argv = redact_arguments(given)  # W&B keeps the command line
            super().init(state, logger)
        finally:
            sys.argv = given

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them without secrets."""
        if self._enabled:
            import wandb

            # A resumed run may differ (a longer max_duration); without allow_val_change that would be an error.
            wandb.config.update(redact(hyperparameters), allow_val_change=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Logs them, as long as W&B lives."""
        with self._or_without():
            super().log_metrics(metrics, step)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Logs it, as long as W&B lives."""
        with self._or_without():
            super().log_table(*args, **kwargs)

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        """Logs them, as long as W&B lives."""
        with self._or_without():
            super().log_images(*args, **kwargs)

    def post_close(self) -> None:
        """Waits until W&B has everything."""
        with self._or_without(Exception):  # it has several of its own for an answer that does not come
            super().post_close()

    @contextlib.contextmanager
    def _or_without(self, lost: type[Exception] = OSError) -> Iterator[None]:
        """Where W&B's process is gone, says so once and goes on."""
        try:
            yield
        except lost as error:
            import wandb

            self._enabled = False
            print(
                f"wandb       W&B is lost ({str(error) or repr(error)}): the run goes on without it; its metrics.jsonl "
                "has everything",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(Exception):
                wandb.teardown(1)  # or it would fail once more, with a traceback, when this process ends


WANDB_RUN_ID = "wandb-run-id"
"""File of a run's folder that holds its identity in W&B, so that a resumed run goes on in the same one."""


def _run_id(path: Path) -> str:
    """The W&B identity of this run folder, made at its first start."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


class File(FileLogger):  # type: ignore[misc]
    """A log file that does not swallow the one before it.

    Composer keeps `overwrite` as a tuple by a stray comma, so it always overwrites: a resumed run would lose the log of
    the part before.
    """

    def __init__(self, *, overwrite: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._replace = overwrite

    def init(self, state: State, logger: Logger) -> None:
        """Opens the file."""
        path = Path(format_name_with_dist(self.filename_format, run_name=state.run_name))
        if path.exists() and not self._replace:
            number = 1
            while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
                number += 1
            path.rename(kept)
        super().init(state, logger)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them without secrets."""
        super().log_hyperparameters(redact(hyperparameters))


class TensorBoard(TensorboardLogger):  # type: ignore[misc]
    """TensorBoard, without secrets among the hyperparameters."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them without secrets."""
        super().log_hyperparameters(redact(hyperparameters))


class MLFlow(MLFlowLogger):  # type: ignore[misc]
    """MLflow, without secrets among the hyperparameters."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Logs them without secrets."""
        super().log_hyperparameters(redact(hyperparameters))


def _wandb(settings: dict[str, Any], folder: Path) -> LoggerDestination:
    return WandB(folder, **settings)


def _tensorboard(settings: dict[str, Any], folder: Path) -> LoggerDestination:
    settings["log_dir"] = settings["log_dir"] or str(folder / "tensorboard")
    return TensorBoard(**settings)


def _mlflow(settings: dict[str, Any], folder: Path) -> LoggerDestination:
    import os

    # mlflow 3 refuses its old default, a folder of files; SQLite is what it recommends instead.
    if settings["tracking_uri"] is None and "MLFLOW_TRACKING_URI" not in os.environ:
        folder.parent.mkdir(parents=True, exist_ok=True)
        settings["tracking_uri"] = f"sqlite:///{(folder.parent / 'mlflow.db').absolute()}"
    return MLFlow(**settings)


def _in_memory(settings: dict[str, Any], folder: Path) -> LoggerDestination:
    return InMemoryLogger(**settings)


def _file(settings: dict[str, Any], folder: Path) -> LoggerDestination:
    settings["filename"] = settings["filename"] or str(folder / "logs" / "rank{rank}.txt")
    return File(**settings)


BUILDERS: dict[str, Callable[[dict[str, Any], Path], LoggerDestination]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "inmemory": _in_memory,
    "file_logger": _file,
}
