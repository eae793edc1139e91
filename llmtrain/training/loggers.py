"""Loggers by the names that llm-foundry gives them. The configs are light; composer is imported when they are built.

`metrics.jsonl` and the loss curve are written without asking (`llmtrain.training.run_folder`); these come on top.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt, model_validator

from llmtrain.config.base import Config
from llmtrain.config.named_blocks import NamedBlocks
from llmtrain.errors import UserError

if TYPE_CHECKING:
    from composer.loggers import LoggerDestination


class WandBConfig(Config):
    """Weights & Biases; works offline with the environment variable WANDB_MODE=offline."""

    project: str | None = None
    """Project."""
    group: str | None = None
    """Group of runs."""
    name: str | None = None
    """Name of the run; the recipe's `run_name` when left out."""
    entity: str | None = None
    """User or team."""
    tags: list[str] | None = None
    """Tags of the run."""
    log_artifacts: bool = False
    """Upload checkpoints, too."""
    rank_zero_only: bool = True
    """Only rank 0 logs."""
    init_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to `wandb.init`. The API key never goes here: use `wandb login` or WANDB_API_KEY."""


class TensorBoardConfig(Config):
    """TensorBoard event files."""

    log_dir: str | None = None
    """Folder; RUN/tensorboard when left out."""
    flush_interval: PositiveInt = 100
    """Batches between writes to disk."""
    rank_zero_only: bool = True
    """Only rank 0 logs."""


class MLFlowConfig(Config):
    """MLflow tracking."""

    experiment_name: str | None = None
    """Experiment; MLFLOW_EXPERIMENT_NAME when left out."""
    run_name: str | None = None
    """Name of the run; the recipe's `run_name` when left out."""
    tags: dict[str, Any] | None = None
    """Tags of the run."""
    tracking_uri: str | None = None
    """Server or database; MLFLOW_TRACKING_URI when left out, else a SQLite file beside the runs' folders."""
    rank_zero_only: bool = True
    """Only rank 0 logs."""
    flush_interval: PositiveInt = 10
    """Seconds between batches of metrics."""
    model_registry_prefix: str = ""
    """Prefix of registered models' names."""
    model_registry_uri: str | None = None
    """Where models are registered."""
    synchronous: bool = False
    """Wait for each write."""
    log_system_metrics: bool = True
    """Log the use of the machine, too."""
    rename_metrics: dict[str, str] | None = None
    """Metric -> name in MLflow."""
    ignore_metrics: list[str] | None = None
    """Glob patterns of metrics that are left out."""
    ignore_hyperparameters: list[str] | None = None
    """Glob patterns of hyperparameters that are left out."""
    run_group: str | None = None
    """Groups runs."""
    resume: bool = False
    """Continue the MLflow run of the same name."""
    logging_buffer_seconds: PositiveInt | None = 10
    """Seconds that values are held back."""
    log_duplicated_metric_every_n_steps: PositiveInt = 100
    """Steps between repetitions of an unchanged value."""


class InMemoryConfig(Config):
    """Metrics in a Python object, for notebooks and tests."""


class FileConfig(Config):
    """A text file with metrics, and with what the run prints."""

    filename: str | None = None
    """File; RUN/logs/rank{rank}.txt when left out."""
    remote_file_name: str | None = None
    """Where loggers that take files put it."""
    capture_stdout: bool = True
    """Also what goes to standard output."""
    capture_stderr: bool = True
    """Also what goes to standard error."""
    buffer_size: int = Field(default=1, ge=1)
    """1 writes line by line, more is a buffer in bytes."""
    log_traces: bool = True
    """Also what algorithms report about themselves."""
    flush_interval: PositiveInt = 100
    """Batches between writes to disk."""
    overwrite: bool = False
    """Replace the file of an earlier start of this run; otherwise it is kept under a numbered name."""


class LoggersConfig(NamedBlocks):
    """Loggers by name."""

    ADVICE: ClassVar[Mapping[str, str]] = {
        "mosaicml": "The MosaicML platform's logger does not exist here. Remove it.",
        "progress_bar": "Use the top-level key `progress_bar: true`.",
        "console": "Use the top-level keys `log_to_console` and `console_log_interval`.",
    }

    wandb: WandBConfig | None = None
    """Weights & Biases."""
    tensorboard: TensorBoardConfig | None = None
    """TensorBoard."""
    mlflow: MLFlowConfig | None = None
    """MLflow."""
    inmemory: InMemoryConfig | None = None
    """In memory (`in_memory_logger` in old recipes)."""
    file_logger: FileConfig | None = None
    """A text file."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "in_memory_logger" in data and "inmemory" not in data:
            return {"inmemory" if key == "in_memory_logger" else key: value for key, value in data.items()}
        return data


_EXTRAS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


def build_loggers(cfg: LoggersConfig | None, folder: Path) -> "list[LoggerDestination]":
    """The loggers that are switched on; their files go into `folder` unless the recipe says otherwise.

    Raises:
        UserError: One needs a package that is not installed.
    """
    if cfg is None:
        return []
    from llmtrain.training import logger_destinations

    built: list[LoggerDestination] = []
    for name, settings in cfg.switched_on():
        try:
            built.append(logger_destinations.BUILDERS[name](settings.model_dump(), folder))
        except ImportError as error:
            package = f"'llmtrain[{_EXTRAS[name]}]'" if name in _EXTRAS else name
            raise UserError(f"loggers.{name} needs a package: pip install {package}. Or remove the logger.") from error
    return built
