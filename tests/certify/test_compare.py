"""Nothing that differs is called the same, and the first difference is the one that is shown."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.certify.compare import (
    compare_all_steps,
    compare_checkpoints,
    compare_evaluations,
    compare_steps,
    largest_loss_difference,
)


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "samples": [[[step], [step + 1]], [[step + 2], []]],
        "loss": {"loss/train/total": (5.0 / step).hex()},
        "lr": [(0.1).hex()],
        "rng": ["ab", "cd"],
    }


ROWS = {step: row(step) for step in range(1, 7)}


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(list(ROWS.values()))
    rows[step - 1].update(values)
    return rows


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"samples": [[[4], [5]], [[7], []]]}, "samples of rank 1"),
        ({"samples": [[[5], [4]], [[6], []]]}, "samples of rank 0"),
        ({"samples": [[[4], [5], [6], []]]}, "number of ranks"),
        ({"loss": {"loss/train/total": float(np.nextafter(1.25, 2)).hex()}}, "loss/train/total"),
        ({"loss": {}}, "loss/train/total"),
        ({"lr": [float(np.nextafter(0.1, 1)).hex()]}, "learning rate"),
        ({"rng": ["ab", "ce"]}, "random state of rank 1"),
        ({"epoch": 1}, "epoch"),
    ],
)
def test_the_first_different_step_and_key(values: dict[str, Any], key: str) -> None:
    rows = changed(4, **values)
    rows[5]["epoch"] = 7  # a later difference
    difference = compare_all_steps(ROWS, rows)
    assert difference is not None
    assert (difference.where, difference.key) == ("step 4", key)
    assert difference.undisturbed != difference.disturbed
    assert compare_all_steps(ROWS, changed(4)) is None


def test_every_step_once_and_no_other() -> None:
    for rows in ([*changed(1)][:5], [*changed(1), row(6)], [*changed(1), row(7)], changed(1)[1:]):
        difference = compare_all_steps(ROWS, rows)
        assert difference is not None
        assert difference.key == "steps that are recorded"
    assert compare_steps(ROWS, [row(4)]) is None  # a part of a run
    unknown = compare_steps(ROWS, [row(9)])
    assert unknown is not None
    assert unknown.where == "step 9"


def test_on_other_ranks_the_global_batch_counts_and_losses_may_round() -> None:
    spread = {"samples": [[[6]], [[]], [[5]], [[4]]], "rng": ["x"] * 4}
    close = {"loss": {"loss/train/total": (1.25 * (1 + 9e-6)).hex()}}
    far = {"loss": {"loss/train/total": (1.25 * (1 + 2e-5)).hex()}}
    assert compare_all_steps(ROWS, changed(4, **spread, **close), elastic=True) is None
    assert largest_loss_difference(ROWS, changed(4, **close)) == pytest.approx(9e-6, rel=0.01)
    for wrong, key in (
        (far, "loss/train/total (more than 1e-05 apart)"),
        ({"loss": {"loss/train/total": "nan"}}, "loss/train/total (more than 1e-05 apart)"),
        ({"samples": [[[6]], [[5]], [[5]], [[]]]}, "samples of the global batch"),
        ({"samples": [[[6, 5]], [[]], [[]], [[4]]]}, "samples of the global batch"),
        ({"lr": [(0.2).hex()]}, "learning rate"),
    ):
        difference = compare_all_steps(ROWS, changed(4, **wrong), elastic=True)
        assert difference is not None
        assert (difference.where, difference.key) == ("step 4", key)


def test_evaluations(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 2.0), ("b", 2.0), ("c", float(np.nextafter(2.0, 3))), ("d", None)):
        runs.append(tmp_path / name)
        runs[-1].mkdir()
        rows = [{"step": 3, "loss/train/total": 1.0}, {"step": 3, "metrics/eval/LanguageCrossEntropy": value}]
        lines = [json.dumps(each) for each in rows if value is not None or "metrics" not in str(each)]
        (runs[-1] / "metrics.jsonl").write_text("\n".join(lines))
    assert compare_evaluations(runs[0], runs[1]) == (1, None)
    assert compare_evaluations(runs[0], runs[2], elastic=True) == (1, None)
    for other in (runs[2], runs[3]):
        for pair in ((runs[0], other), (other, runs[0])):
            _, difference = compare_evaluations(*pair)
            assert difference is not None
            assert (difference.where, difference.key) == ("step 3", "metrics/eval/LanguageCrossEntropy")


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A full checkpoint of the kind that Composer writes."""
    content: dict[str, Any] = {
        "state": {
            "model": {"model.w": torch.linspace(0, 1, 12).view(3, 4), "model.n": torch.tensor([float("nan"), 1.0])},
            "optimizers": {"AdamW": {"state": {"model.w": {"exp_avg": torch.zeros(3, 4, dtype=torch.bfloat16)}}}},
            "run_name": folder.name,
            "schedulers": {"LambdaLR": {"_last_lr": [0.1]}},
            "timestamp": {"Timestamp": {"batch": 6, "total_wct": folder.name}},
        },
        "rng": [{"numpy": ("MT19937", np.arange(6, dtype=np.uint32), 3), "torch": torch.arange(5).byte()}],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        block: Any = content
        for parent in parents:
            block = block[int(parent) if isinstance(block, list) else parent]
        block[last] = value
    folder.mkdir()
    torch.save(content, folder / "full.pt")
    return folder


def test_checkpoints_that_are_the_same_but_for_name_and_time(tmp_path: Path) -> None:
    compared, difference = compare_checkpoints(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    assert difference is None
    assert (compared.tensors, compared.size) == (4, 12 * 4 + 8 + 12 * 2 + 5)
    assert compared.values >= 3


def flipped(bit: int) -> torch.Tensor:
    weight = torch.linspace(0, 1, 12).view(3, 4).clone()
    weight.view(torch.int32)[1, 2] ^= 1 << bit
    return weight


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"state__model__model.w": flipped(0)}, "state.model.model.w[1, 2] and 0 more elements"),
        ({"state__model__model.w": flipped(31)}, "state.model.model.w[1, 2] and 0 more elements"),
        ({"state__model__model.w": torch.linspace(0, 1, 12).view(4, 3)}, "state.model.model.w shape and dtype"),
        (
            {"state__optimizers__AdamW__state__model.w__exp_avg": -torch.zeros(3, 4, dtype=torch.bfloat16)},
            "state.optimizers.AdamW.state.model.w.exp_avg[0, 0] and 11 more elements",
        ),
        ({"state__timestamp__Timestamp__batch": 7}, "state.timestamp.Timestamp.batch"),
        ({"state__schedulers__LambdaLR___last_lr": [0.2]}, "state.schedulers.LambdaLR._last_lr.0"),
        ({"rng__0__numpy": ("MT19937", np.arange(6, dtype=np.uint32), 4)}, "rng.0.numpy"),
        ({"rng__0__numpy": ("MT19937", np.arange(1, 7, dtype=np.uint32), 3)}, "rng.0.numpy"),
        ({"rng__0__torch": torch.arange(1, 6).byte()}, "rng.0.torch[0] and 4 more elements"),
        ({"state__more": 1}, "state.more"),
    ],
)
def test_one_bit_is_a_difference(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    _, difference = compare_checkpoints(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", **changes))
    assert difference is not None
    assert difference.key == key
