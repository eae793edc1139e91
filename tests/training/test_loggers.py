import inspect
import sqlite3
import time
from pathlib import Path

import composer
import composer.loggers
import pytest
import torch
from torch.utils.data import DataLoader

from llmtrain.training import logger_destinations
from llmtrain.training.loggers import LoggersConfig, build_loggers

CLASSES = {
    "wandb": composer.loggers.WandBLogger,
    "tensorboard": composer.loggers.TensorboardLogger,
    "mlflow": composer.loggers.MLFlowLogger,
    "inmemory": composer.loggers.InMemoryLogger,
    "file_logger": composer.loggers.FileLogger,
}
HYPERPARAMETERS = {"seed": 17, "loggers": {"wandb": {"init_kwargs": {"api_key": "planted-secret"}}},
                   "train_loader": {"remote": "sftp://me:planted-secret@host/data"}}  # fmt: skip


class Regression(composer.ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


def run(loggers: list[composer.loggers.LoggerDestination]) -> None:
    model = Regression()
    trainer = composer.Trainer(
        model=model,
        run_name="some-run",
        train_dataloader=DataLoader(torch.randn(6, 3), batch_size=2),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="3ba",
        loggers=loggers,
        device="cpu",
        log_to_console=False,
        progress_bar=False,
        auto_log_hparams=False,
    )
    trainer.logger.log_hyperparameters(HYPERPARAMETERS)
    trainer.fit()
    trainer.close()


def everything_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def build(folder: Path, **blocks: object) -> list[composer.loggers.LoggerDestination]:
    return build_loggers(LoggersConfig.model_validate(blocks), folder)


@pytest.mark.parametrize("name", sorted(LoggersConfig.model_fields))
def test_settings_are_those_of_composers_class(name: str) -> None:
    real = set(inspect.signature(CLASSES[name].__init__).parameters) - {"self"}
    (member,) = (m for m in LoggersConfig.model_fields[name].annotation.__args__ if m is not type(None))
    assert set(member.model_fields) == real


def test_nothing_asked_nothing_built(tmp_path: Path) -> None:
    assert build_loggers(None, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_old_name_of_the_in_memory_logger(tmp_path: Path) -> None:
    for name in ("inmemory", "in_memory_logger"):
        (logger,) = build(tmp_path, **{name: {}})
        assert type(logger) is composer.loggers.InMemoryLogger


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(build(tmp_path, wandb={"project": "test", "tags": ["a"]}))
    (first,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 120
    while b"loss/train/total" not in first.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)  # `wandb.finish` returns before W&B's own process has written everything
    log = first.read_bytes()
    assert b"loss/train/total" in log
    assert b"some-run" in log
    assert b"planted-secret" not in everything_under(tmp_path)

    # Started again in the same folder, it is the same W&B run.
    identity = (tmp_path / "wandb-run-id").read_text()
    assert identity in first.name
    run(build(tmp_path, wandb={"project": "test"}))
    assert {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")} == {f"run-{identity}"}


def test_a_run_outlives_the_process_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler's SIGTERM ends it, and the rank has still to save (see tests/launching/test_slurm_training.py)."""
    wandb = pytest.importorskip("wandb")
    asked = []

    def gone(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise ConnectionResetError(104, "Connection reset by peer")

    for name in ("log", "teardown", "finish"):
        monkeypatch.setattr(wandb, name, gone)
    monkeypatch.setattr(wandb, "run", object())
    (logger,) = build(tmp_path, wandb={"project": "test"})
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    logger.log_table(["a"], [["b"]])
    logger.post_close()
    assert asked == [({"a": 1.0}, 1), (1,)]  # then it was torn down, and left alone
    assert capsys.readouterr().err.count("the run goes on without it") == 1


def test_tensorboard_writes_into_the_run_folder(tmp_path: Path) -> None:
    run(build(tmp_path, tensorboard={"flush_interval": 1}))
    events = list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    assert events
    written = everything_under(tmp_path)
    assert b"loss/train/total" in written
    assert b"planted-secret" not in written


@pytest.mark.long
@pytest.mark.slow
def test_mlflow_defaults_to_sqlite_beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "some-run"
    run(build(folder, mlflow={"experiment_name": "test", "log_system_metrics": False, "synchronous": True}))
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        names = {row[0] for row in database.execute("select key from metrics")}
        assert "loss/train/total" in names
    assert b"planted-secret" not in everything_under(tmp_path)


def test_file_logger_keeps_the_log_of_the_start_before(tmp_path: Path) -> None:
    for _ in range(3):
        run(build(tmp_path, file_logger={"capture_stdout": False, "capture_stderr": False}))
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert files == ["rank0.1.txt", "rank0.2.txt", "rank0.txt"]
    for name in files:
        text = (tmp_path / "logs" / name).read_text()
        assert "[metric][batch=2]: loss/train/total" in text
        assert "planted-secret" not in text
    run(build(tmp_path, file_logger={"capture_stdout": False, "capture_stderr": False, "overwrite": True}))
    assert len(list((tmp_path / "logs").iterdir())) == 3


def test_every_name_has_a_builder() -> None:
    assert set(logger_destinations.BUILDERS) == set(LoggersConfig.model_fields)
