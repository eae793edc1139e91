"""Which checkpoints of a run stay: the newest few, one of each long span, and the best. On disk as in a store."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmtrain.config.durations import parse

Moment = tuple[int, int]
"""Finished steps, finished epochs."""


@dataclass(frozen=True)
class Retention:
    """What the recipe says."""

    keep: int = -1
    """The newest so many stay, at least one; -1 keeps all."""
    every: str | None = None
    """The first checkpoint at or after each multiple of this span stays as well: `10000ba`, `1ep`."""

    def kept(self, moments: Mapping[str, Moment], protected: Iterable[str] = ()) -> set[str]:
        """Names of those that stay.

        Args:
            moments: by name, of checkpoints that are complete and sound.
            protected: names that stay and do not count: the best one.
        """
        names = sorted(moments, key=lambda name: (*moments[name], name), reverse=True)
        if self.keep < 0:
            return set(names)
        apart = set(protected)
        counted = [name for name in names if name not in apart or name == names[0]]
        kept = set(counted[: max(self.keep, 1)]) | (apart & moments.keys())
        if self.every is not None:
            span = parse(self.every)
            first: dict[int, str] = {}
            for name in names:  # the newest first, so that the oldest of a span is what remains
                first[moments[name][span.unit == "ep"] // int(span.value)] = name
            kept |= {name for index, name in first.items() if index > 0}
        return kept
