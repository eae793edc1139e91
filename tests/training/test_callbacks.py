import gc
import inspect
import math
from collections.abc import Iterator

import composer
import pytest
import torch
from composer.core import Time
from composer.loggers import InMemoryLogger
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader

from llmtrain.testing.ranks import run_ranks
from llmtrain.training.callbacks import CallbacksConfig, build_callbacks, callback_classes
from llmtrain.training.optimizer_monitor import OptimizerMonitor, norms
from llmtrain.training.scheduled_gc import ScheduledGC

NAMES = sorted(CallbacksConfig.model_fields)


def config_class(name: str) -> type:
    return next(member for member in CallbacksConfig.model_fields[name].annotation.__args__ if member is not type(None))


def test_every_known_name_has_a_class() -> None:
    assert set(callback_classes()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(callback_classes()[name].__init__).parameters
    real = {
        key: p for key, p in parameters.items() if key != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    fields = config_class(name).model_fields
    assert set(fields) == set(real)
    for key, parameter in real.items():
        if key == "patience":  # an integer counts epochs
            assert fields[key].default == "1ep"
        elif parameter.default is not parameter.empty:
            assert fields[key].default == parameter.default, key
        else:
            assert fields[key].is_required(), key


@pytest.mark.parametrize("written", [None, {}, True])
def test_a_name_alone_switches_on(written: object) -> None:
    (callback,) = build_callbacks(CallbacksConfig.model_validate({"lr_monitor": written}))
    assert isinstance(callback, composer.callbacks.LRMonitor)


def test_all_of_them_build_and_round_trip() -> None:
    given = {name: {} for name in NAMES} | {
        "early_stopper": {"monitor": "LanguageCrossEntropy", "dataloader_label": "eval", "patience": "20ba"},
        "speed_monitor": {"window_size": 3},
        "scheduled_gc": {"batch_interval": 7},
        "generate_callback": {"prompts": ["x", [{"role": "user", "content": "y"}], {"text": "z"}]},
        "hf_checkpointer": {"save_folder": "runs/{run_name}", "save_interval": "10ba"},
    }
    config = CallbacksConfig.model_validate(given)
    built = build_callbacks(config)
    assert [type(callback) for callback in built] == [callback_classes()[name] for name, _ in config.switched_on()]
    assert len(built) == len(NAMES)
    assert CallbacksConfig.model_validate(config.model_dump(mode="json")) == config
    stopper = next(callback for callback in built if isinstance(callback, composer.callbacks.EarlyStopper))
    assert stopper.patience == Time.from_timestring("20ba")
    assert stopper.comp_func is torch.less  # to Composer, a cross-entropy is no loss


def test_only_what_is_on_is_dumped() -> None:
    assert CallbacksConfig.model_validate({"lr_monitor": {}, "nan_monitor": False}).model_dump() == {"lr_monitor": {}}
    assert CallbacksConfig.model_validate(None).model_dump() == {}


def test_early_stopping_on_the_training_loss_is_refused() -> None:
    with pytest.raises(ValidationError, match="Use an evaluator's label"):
        CallbacksConfig.model_validate({"early_stopper": {"monitor": "loss/train/total", "dataloader_label": "train"}})


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, halves: bool = False) -> None:
    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
    if halves:  # each rank a half: the mean over ranks is the mean over all
        rank = torch.distributed.get_rank()
        data = data[4 * rank : 4 * rank + 4]
    optimizer.zero_grad()
    model(data).square().mean().backward()
    optimizer.step()


def expected_norms(kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """What `norms` says, and the same from whole tensors with the update measured as what the step took away."""
    model = make_model()
    optimizer = optimizer_of(kind, model)
    one_step(model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one_step(model, optimizer)
    by_hand = {}
    for name, parameter in model.named_parameters():
        by_hand[f"l2_norm/grad/{name}"] = parameter.grad.norm().item()
        by_hand[f"l2_norm/param/{name}"] = parameter.norm().item()
        by_hand[f"l2_norm/moment/{name}"] = optimizer.state[parameter]["exp_avg"].norm().item()
        if kind != "lion":
            by_hand[f"l2_norm/update/{name}"] = (before[name] - parameter).norm().item()
    gradients = [value for key, value in by_hand.items() if "/grad/" in key]
    by_hand["l2_norm/grad/global"] = math.sqrt(sum(value**2 for value in gradients))
    return norms(model, optimizer, layers=True), by_hand


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    from composer.optim import DecoupledAdamW

    from llmtrain.training.lion import DecoupledLionW

    if kind == "lion":
        return DecoupledLionW(model.parameters(), lr=1e-2)
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    return DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("kind", ["adamw", "decoupled_adamw", "lion"])
def test_norms_are_those_of_the_tensors(kind: str) -> None:
    measured, by_hand = expected_norms(kind)
    assert measured == pytest.approx(by_hand, rel=1e-3)


def test_only_the_global_norm_without_layers() -> None:
    model = make_model()
    optimizer = optimizer_of("adamw", model)
    assert norms(model, optimizer, layers=False) == {}
    one_step(model, optimizer)
    assert list(norms(model, optimizer, layers=False)) == ["l2_norm/grad/global"]


def _sharded_norms() -> dict[str, dict[str, float]]:
    """Norms of a sharded model by mesh: 1-d over all ranks, and 2-d with replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for label, mesh in {
        "fsdp": None,
        "hsdp": init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard")),
    }.items():
        model = make_model()
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        optimizer = optimizer_of("decoupled_adamw", model)
        for _ in range(2):
            one_step(model, optimizer, halves=True)
        found[label] = norms(model, optimizer, layers=True)
    return found


@pytest.mark.slow
@pytest.mark.gloo_training
def test_norms_under_sharding_are_those_of_one_process() -> None:
    _, single = expected_norms("decoupled_adamw")
    for ranks in run_ranks(_sharded_norms, 2):
        assert ranks["fsdp"] == pytest.approx(single, rel=1e-3)
        assert ranks["hsdp"] == pytest.approx(single, rel=1e-3)


class Regression(composer.ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()


@pytest.fixture
def garbage_collection() -> Iterator[None]:
    yield
    gc.enable()


def test_callbacks_in_a_real_run(garbage_collection: None) -> None:
    model, memory = Regression(), InMemoryLogger()
    config = CallbacksConfig.model_validate(
        {
            "speed_monitor": {"window_size": 2},
            "lr_monitor": None,
            "optimizer_monitor": {"batch_log_interval": 2},
            "nan_monitor": {},
            "scheduled_gc": {"batch_interval": 2, "gen_1_batch_interval": 1},
        }
    )
    seen = []

    class Look(composer.Callback):
        def batch_end(self, state: composer.State, logger: composer.Logger) -> None:
            seen.append(gc.isenabled())

    trainer = composer.Trainer(
        model=model,
        train_dataloader=DataLoader(torch.randn(12, 5), batch_size=2),
        optimizers=optimizer_of("decoupled_adamw", model),
        max_duration="4ba",
        callbacks=[*build_callbacks(config), Look()],
        loggers=[memory],
        device="cpu",
        log_to_console=False,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    assert seen == [False] * 4
    assert gc.isenabled()
    assert len(memory.data["l2_norm/grad/global"]) == 2
    assert "l2_norm/update/model.0.weight" in memory.data
    assert "lr-DecoupledAdamW/group0" in memory.data
    assert "throughput/batches_per_sec" in memory.data


def test_own_classes_stand_behind_the_names_that_composer_gets_wrong() -> None:
    assert callback_classes()["optimizer_monitor"] is OptimizerMonitor
    assert callback_classes()["scheduled_gc"] is ScheduledGC
