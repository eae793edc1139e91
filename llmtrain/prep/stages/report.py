"""What the stages did: counts, and samples of what they dropped and changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.prep.documents import Document
from llmtrain.prep.stages.step import EXCERPT, Change, Drop, Verdict

_SUMS = ("seen", "dropped", "changed", "seen_bytes", "dropped_bytes")


class StageCounts:
    """What one stage did to the documents of one partition."""

    def __init__(self, name: str, max_samples: int) -> None:
        self.name = name
        self.dropped_last = False
        """Whether the last document was dropped here."""
        self._max_samples = max_samples
        self._sums = dict.fromkeys(_SUMS, 0)
        self._counts: dict[str, int] = {}
        self._samples: list[dict[str, str]] = []

    def add(self, document: Document, verdict: Verdict) -> None:
        """Count a document, or the first part of one."""
        self.dropped_last = isinstance(verdict, Drop)
        self._sums["seen"] += 1
        if isinstance(verdict, Drop):
            self._sums["dropped"] += 1
            self._counts[verdict.reason] = self._counts.get(verdict.reason, 0) + 1
            reason = f"{verdict.reason}: {verdict.detail}" if verdict.detail else verdict.reason
            self._sample(document, reason, verdict.excerpt)
        elif isinstance(verdict, Change):
            self._sums["changed"] += 1
            for what, count in verdict.counts.items():
                self._counts[what] = self._counts.get(what, 0) + count
            self._sample(
                document, ", ".join(f"{count} {what}" for what, count in verdict.counts.items()), verdict.excerpt
            )
        self.more(document, kept=not self.dropped_last)

    def more(self, document: Document, *, kept: bool) -> None:
        """Count the bytes of a further part of the last document."""
        self._sums["seen_bytes"] += document.n_bytes
        if not kept and self.dropped_last:
            self._sums["dropped_bytes"] += document.n_bytes

    def _sample(self, document: Document, reason: str, excerpt: str) -> None:
        if len(self._samples) < self._max_samples:
            excerpt = excerpt or document.text[:EXCERPT]
            self._samples.append({"place": document.place, "reason": reason, "excerpt": excerpt})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            **self._sums,
            "counts": dict(sorted(self._counts.items())),
            "max_samples": self._max_samples,
            "samples": self._samples,
        }


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The reports of all partitions, in the plan's order, as one; it does not depend on how they were cut.

    Returns:
        `stages`: for each stage its `name`, how many documents it has `seen`, `dropped` and `changed`, `seen_bytes` and
        `dropped_bytes` (UTF-8), `counts` by reason, and `samples`: `place`, `reason`, `excerpt`.
    """
    merged: list[dict[str, Any]] = []
    for report in reports:
        for number, stage in enumerate(report["stages"]):
            if number == len(merged):
                empty = {"counts": {}, "max_samples": stage["max_samples"], "samples": []}
                merged.append({"name": stage["name"], **dict.fromkeys(_SUMS, 0), **empty})
            into = merged[number]
            for key in _SUMS:
                into[key] += stage[key]
            for what, count in stage["counts"].items():
                into["counts"][what] = into["counts"].get(what, 0) + count
            into["samples"] = [*into["samples"], *stage["samples"]][: into["max_samples"]]
    for into in merged:
        into["counts"] = dict(sorted(into["counts"].items()))
    return {"stages": merged}


def print_stage_report(console: Console, report: Mapping[str, Any]) -> None:
    """A table, one line a stage."""
    if not report["stages"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for column in ("seen", "dropped", "", "changed", "dropped MB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for stage in report["stages"]:
        most = sorted(stage["counts"].items(), key=lambda item: (-item[1], item[0]))
        what = ", ".join(f"{count:,} {_short(name)}" for name, count in most[:4])
        table.add_row(
            stage["name"],
            f"{stage['seen']:,}",
            f"{stage['dropped']:,}",
            f"{stage['dropped'] / max(1, stage['seen']):.1%}",
            f"{stage['changed']:,}",
            f"{stage['dropped_bytes'] / 1e6:,.2f}",
            what + (f", {len(most) - 4} more" if len(most) > 4 else ""),
        )
    console.print(table, markup=False)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"
