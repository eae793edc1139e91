"""What tasks gave: one shape for lm-evaluation-harness and for llm-foundry's tasks. Light: imports no torch."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task."""

    task: str
    """Name of the task, without the number of shots."""
    num_fewshot: int | None
    """Examples before each question; None where the task does not say."""
    metric: str
    """Name of the metric, as its engine spells it: `acc_norm`, `exact_match`."""
    value: float
    """As the engine gives it; accuracies are fractions, not percentages."""
    stderr: float | None = None
    """Standard error of the mean over samples; None where it is not known."""
    n: int | None = None
    """Samples."""
    expected: float | None = None
    """A value that was published for this model, on the same scale."""
    random_baseline: float | None = None
    """What guessing gives, on the same scale."""
    higher_is_better: bool = True
    """False for losses and perplexities."""

    @property
    def label(self) -> str:
        """`task/N-shot`, llm-foundry's way to name it; the task alone where the number of shots is not known."""
        return self.task if self.num_fewshot is None else f"{self.task}/{self.num_fewshot}-shot"


@dataclass(frozen=True)
class TaskResults:
    """All that the tasks of one engine gave for one model."""

    rows: list[TaskResult] = field(default_factory=list)
    """In the order in which they are shown."""
    averages: dict[str, float] = field(default_factory=dict)
    """Of the gauntlet: categories and named averages."""
    about: dict[str, Any] = field(default_factory=dict)
    """What belongs beside the numbers: versions, limits, hashes of tasks. Fit for JSON."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; without what is not known."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows]
        return {"tasks": rows, "averages": dict(self.averages), "about": dict(self.about)}


def merged(parts: Iterable[TaskResults]) -> TaskResults:
    """Several engines' results as one; of `about`, later ones win."""
    parts = list(parts)
    return TaskResults(
        [row for part in parts for row in part.rows],
        {name: value for part in parts for name, value in part.averages.items()},
        {key: value for part in parts for key, value in part.about.items()},
    )
