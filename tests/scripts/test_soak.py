"""The soak: what counts as growth, and a short one for real."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "scripts"
STEPS = 1_000


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("soak")


def flat(soak: ModuleType) -> list[Any]:
    """Two ranks that hold what they hold, with noise of 2 MB."""
    rng = random.Random(1)
    return [
        soak.Sample(
            *(step / 10, step, rank, 500_000 + rng.gauss(0, 2_000), 600_000.0, 40_000.0),
            *(60 + rng.randrange(3), 20, 26, 1, 5),
        )
        for step in range(0, STEPS, 4)
        for rank in (0, 1)
    ]


def grown(soak: ModuleType, samples: list[Any]) -> list[tuple[int, str]]:
    return [(growth.rank, growth.what) for growth in soak.growths(samples, STEPS, 10.0) if growth.grew]


def test_noise_is_no_growth(soak: ModuleType) -> None:
    assert grown(soak, flat(soak)) == []


def test_memory_that_grows_is_found(soak: ModuleType) -> None:
    samples = [replace(s, memory=s.memory + 12 * s.step) if s.rank == 1 else s for s in flat(soak)]
    assert grown(soak, samples) == [(1, "memory")]


def test_what_the_warm_up_takes_does_not_count(soak: ModuleType) -> None:
    samples = [replace(s, memory=s.memory - 200 * max(0, 200 - s.step)) for s in flat(soak)]
    assert grown(soak, samples) == []


def test_a_process_that_comes_and_goes_is_no_growth(soak: ModuleType) -> None:
    """As an export late in the run; loader workers that grow beside it are found."""
    exports = [replace(s, workers=s.workers + 400_000, children=2) if 900 <= s.step < 930 else s for s in flat(soak)]
    assert grown(soak, exports) == []
    growing = [replace(s, workers=s.workers + 12 * s.step) for s in exports]
    assert grown(soak, growing) == [(0, "workers"), (1, "workers")]


@pytest.mark.parametrize("what", ["files", "threads", "segments", "children", "checkpoints"])
def test_one_more_every_save_is_found(soak: ModuleType, what: str) -> None:
    samples = [replace(s, **{what: getattr(s, what) + s.step // 100}) for s in flat(soak)]
    assert grown(soak, samples) == [(0, what), (1, what)]


def test_too_few_samples_say_nothing(soak: ModuleType) -> None:
    with pytest.raises(SystemExit, match="too few"):
        soak.growths(flat(soak)[:40], STEPS)


def run_soak(soak: ModuleType, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = soak.main([*arguments, "--out", str(out)])
    assert (out / "soak.png").stat().st_size > 10_000
    assert len((out / "soak.csv").read_text().splitlines()) > 20
    return code, json.loads((out / "soak.json").read_text())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_a_short_soak(soak: ModuleType, tmp_path: Path) -> None:
    """Files, threads, segments and processes do not grow; memory still warms up, so only a step's batch is too much."""
    code, report = run_soak(
        soak, tmp_path / "out", "--steps", "300", "--interval", "0.2", "--bound", "2000", "--no-export"
    )
    assert code == 0, report["growths"]
    assert {growth["what"] for growth in report["growths"]} >= {"memory", "files", "segments"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.gloo_training
def test_5000_steps_stay_flat(soak: ModuleType, tmp_path: Path) -> None:
    code, report = run_soak(soak, tmp_path / "out")
    assert code == 0, report["growths"]
