"""llm-foundry's gauntlet: accuracies averaged by category, and categories averaged by name."""

import math
from collections.abc import Callable, Mapping

from llmtrain.evaluation.icl.config import BenchmarkConfig, GauntletConfig

Say = Callable[[str], None]
"""Called with a line for the user."""

PREFIX = "icl/metrics/eval_gauntlet"
"""Loggers get `icl/metrics/eval_gauntlet/NAME`."""


def averages(
    cfg: GauntletConfig,
    accuracies: Mapping[str, float],
    sizes: Mapping[str, int],
    say: Say = lambda line: None,
) -> dict[str, float]:
    """The mean of each category and of each named average.

    Of a benchmark with categories of its own (`mmlu/5-shot/anatomy`) the plain mean of these counts. A category that
    lacks a benchmark is left out, and an average is that of the categories that are left, as in llm-foundry; where none
    is left there it is 0, here it is left out.

    Args:
        cfg: the gauntlet.
        accuracies: `LABEL/N-shot` or `LABEL/N-shot/CATEGORY` -> accuracy.
        sizes: the same -> number of questions.
        say: is told in one line of each category or average that is left out.
    """
    scores: dict[str, float] = {}
    for category in cfg.categories:
        found = [(b, _of_benchmark(b, accuracies), _weight(cfg, b, sizes)) for b in category.benchmarks]
        missing = [_key(b) for b, value, _ in found if value is None]
        if missing:
            say(f"eval_gauntlet: category {category.name} is left out: no result of {', '.join(missing)}")
            continue
        total = sum(weight for _, _, weight in found)
        scores[category.name] = sum(
            _above_guessing(cfg, b, value) * weight / total for b, value, weight in found if value is not None
        )
    of_names = {}
    for name, parts in cfg.named_averages.items():
        there = [scores[part] for part in parts if part in scores]
        if there:
            of_names[name] = sum(there) / len(there)
            if len(there) < len(parts):
                say(f"eval_gauntlet: average {name} is that of {len(there)} of its {len(parts)} categories")
        else:
            say(f"eval_gauntlet: average {name} is left out: none of its categories has a result")
    return scores | of_names


def random_baselines(cfg: GauntletConfig | None) -> dict[str, float]:
    """`LABEL/N-shot` -> what the gauntlet takes guessing for."""
    if cfg is None:
        return {}
    return {_key(b): b.random_baseline for category in cfg.categories for b in category.benchmarks}


def _key(benchmark: BenchmarkConfig) -> str:
    return f"{benchmark.name}/{benchmark.num_fewshot}-shot"


def _is_of(label: str, benchmark: BenchmarkConfig) -> bool:
    key = _key(benchmark)
    return label == key or label.startswith(f"{key}/")


def _of_benchmark(benchmark: BenchmarkConfig, accuracies: Mapping[str, float]) -> float | None:
    parts = [value for label, value in accuracies.items() if _is_of(label, benchmark)]
    return sum(parts) / len(parts) if parts else None


def _weight(cfg: GauntletConfig, benchmark: BenchmarkConfig, sizes: Mapping[str, int]) -> float:
    if cfg.weighting == "EQUAL":
        return 1.0
    size = max(sum(n for label, n in sizes.items() if _is_of(label, benchmark)), 1)
    return float(size) if cfg.weighting == "SAMPLE_SZ" else max(math.log2(size), 1.0)


def _above_guessing(cfg: GauntletConfig, benchmark: BenchmarkConfig, value: float) -> float:
    guess = benchmark.random_baseline if cfg.subtract_random_baseline else 0.0
    return (value - guess) / (1 - guess if cfg.rescale_accuracy else 1)
