"""What a certificate says. Light."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.certify.compare import Difference
from llmtrain.certify.segment import Kill


@dataclass
class Certificate:
    """The result of one certification, filled in as it goes.

    Attributes:
        recipe: of which recipe.
        command: the options that give the same kill points.
        changes: what was changed in the recipe.
        versions: of llmtrain and what it stands on; the device.
        kills: in their order, those of the run on the same ranks.
        resumed: the steps of the checkpoints from which that run went on, start by start; 0 where there was none yet.
        elastic_ranks: numbers of ranks of the elastic run's starts, in their order; empty where there was none.
        elastic_note: why there was none, or what was changed for it.
        compared: what was compared, and how much of it.
        largest_loss_difference: of the elastic run, relative.
        difference: the first one; None when all is the same.
        problem: a run that did not get to its end; None when all did.
        losses: loss by step of the undisturbed and of the other runs, for the picture.
        seconds: it took.
    """

    recipe: str
    command: dict[str, Any]
    changes: tuple[str, ...]
    versions: dict[str, str]
    kills: list[Kill] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    elastic_ranks: list[int] = field(default_factory=list)
    elastic_note: str | None = None
    compared: dict[str, str] = field(default_factory=dict)
    largest_loss_difference: float | None = None
    difference: Difference | None = None
    problem: str | None = None
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def granted(self) -> bool:
        """Whether everything is the same."""
        return self.difference is None and self.problem is None

    def by_kind(self) -> dict[str, int]:
        """Number of kills inside of each kind of thing."""
        counts: dict[str, int] = {}
        for kill in self.kills:
            counts[kill.kind] = counts.get(kill.kind, 0) + 1
        return counts

    def write(self, file: Path) -> None:
        """As JSON, atomically."""
        content = {"granted": self.granted, "kills_by_kind": self.by_kind(), **dataclasses.asdict(self)}
        temporary = file.with_name(f".{file.name}")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)
