"""When a run is killed: points drawn from a seed, so that all kinds come, and the run still reaches its end. Light."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["step", "save", "evaluation", "start"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Stage = Literal["begun", "files", "manifest", "later"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Of a save: its folder is there; files are in it; the manifest, so that only the name is missing; a moment later."""

SHARES: dict[Kind, float] = {"step": 0.35, "save": 0.35, "evaluation": 0.15, "start": 0.15}
ONE_RANK = 0.3
"""Share of the kills that end one rank alone; a launcher then ends the others."""


@dataclass(frozen=True)
class Point:
    """Where a run is to be killed next.

    Attributes:
        kind: inside of what.
        after: finished steps that are waited for first.
        moment: 0 to 1: which part of the step, evaluation or start passes before it.
        stage: of a save.
        rank: the only one to be killed; None for all.
    """

    kind: Kind
    after: int
    moment: float
    stage: Stage
    rank: int | None


class Plan:
    """The points of a run.

    Args:
        seed: decides them all.
        kills: how many there will be.
        steps: of the run.
        evaluates: whether there is an evaluation to kill it in.
    """

    def __init__(self, seed: int, kills: int, steps: int, *, evaluates: bool = True) -> None:
        self._random = random.Random(f"certify {seed}")
        self.kills = kills
        self.steps = steps
        kinds = [kind for kind in KINDS if evaluates or kind != "evaluation"]
        self._deck = _deal(kills, kinds)
        self._random.shuffle(self._deck)
        self._drawn = 0

    def next(self, began: int, ranks: int) -> Point | None:
        """The next point of a run that has just continued; None when all have been.

        It lies behind where the run began this time by chance, but the farther in the run the more kills there were:
        so the run gets on, although a kill need not come after a new checkpoint.

        Args:
            began: the step that it goes on from.
            ranks: it has.
        """
        if self._drawn == self.kills:
            return None
        kind = self._deck[self._drawn]
        self._drawn += 1
        frontier = max(began, min(self.steps - 2, round(self.steps * self._drawn / (self.kills + 1))))
        return Point(
            kind,
            after=self._random.randint(min(began, frontier), frontier),
            moment=self._random.random(),
            stage=self._random.choice(STAGES),
            rank=self._random.randrange(ranks) if ranks > 1 and self._random.random() < ONE_RANK else None,
        )


def _deal(kills: int, kinds: Sequence[Kind]) -> list[Kind]:
    """So many of each kind; one of each at least where there are enough."""
    whole = sum(SHARES[kind] for kind in kinds)
    counts = Counter({kind: int(kills * SHARES[kind] / whole) for kind in kinds})
    for kind in sorted(kinds, key=lambda kind: (counts[kind], -SHARES[kind])):
        if counts.total() < kills:
            counts[kind] += 1
    while counts.total() < kills:
        counts["step"] += 1
    return list(counts.elements())
