"""The benchmark of generation: what it computes from its figures."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("generate")


def test_cases(benchmark: ModuleType) -> None:
    assert benchmark.Case.parse("125m:bf16:8x512+64") == ("125m", "bf16", 8, 512, 64)
    assert all(benchmark.Case.parse(case) for case in benchmark.CASES)
    assert len(set(benchmark.CASES)) == 16
    for wrong in ("125m:bf16:8x512", "9t:fp32:1x1+1", "tiny:int8:1x1+1"):
        with pytest.raises(SystemExit, match="--cases"):
            benchmark.Case.parse(wrong)


def test_the_first_difference_of_all_rows(benchmark: ModuleType) -> None:
    ours = [[1, 2, 3], [4, 5, 6]]
    assert benchmark.first_difference(ours, [[1, 2, 3], [4, 5, 6]]) is None
    assert benchmark.first_difference(ours, [[1, 2, 9], [4, 8, 6]]) == {"row": 1, "step": 1, "before": [4]}


def test_the_ratio_is_the_median_over_the_rounds(benchmark: ModuleType) -> None:
    rounds = {
        "llmtrain": [{"cpu": 1.0}, {"cpu": 2.0}, {"cpu": 9.0}],
        "transformers": [{"cpu": 2.0}, {"cpu": 5.0}, {"cpu": 10.0}],
    }
    assert benchmark.ratio(rounds, "cpu") == 0.5  # of 0.5, 0.4 and 0.9
