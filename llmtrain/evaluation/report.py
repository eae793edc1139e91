"""Results of an evaluation: a table on the console, JSON, CSV and a picture on disk."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.evaluation.by_position import LossByPosition
from llmtrain.evaluation.by_source import SourceLoss
from llmtrain.evaluation.picture import draw_loss_by_position


@dataclass(frozen=True)
class AtLength:
    """What was found at one length."""

    max_seq_len: int
    """Tokens in a window."""
    losses: LossByPosition
    """Loss at each position."""
    seconds: float
    """How long it took."""
    by_source: dict[str, SourceLoss] = field(default_factory=dict)
    """Loss of each source, where there are several."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "max_seq_len": self.max_seq_len,
            "loss": self.losses.loss,
            "perplexity": perplexity(self.losses.loss),
            "targets": self.losses.targets,
            "seconds": round(self.seconds, 3),
            **({"by_source": {k: v._asdict() for k, v in self.by_source.items()}} if self.by_source else {}),
            "by_position": [b.as_dict() for b in self.losses.curve()],
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def write_results(stem: Path, about: dict[str, Any], found: list[AtLength]) -> list[Path]:
    """Write STEM.json, STEM.csv and STEM.png, each atomically; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    names = [stem.with_name(stem.name + suffix) for suffix in (".json", ".csv", ".png")]
    content = {**about, "lengths": [one.as_dict() for one in found]}
    _replace(names[0], json.dumps(content, indent=2) + "\n")
    temporary = names[1].with_name(f".{names[1].name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["max_seq_len", "first", "last", "loss", "targets"])
        rows.writerows(
            (one.max_seq_len, b.first, b.last, b.loss, b.targets) for one in found for b in one.losses.curve()
        )
    temporary.replace(names[1])
    curves = {f"{one.max_seq_len:,} tokens": one.losses.curve() for one in found}
    draw_loss_by_position(curves, str(about["source"]), names[2])
    return names


def print_results(console: Console, found: list[AtLength]) -> None:
    """A table, one line a length."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("max_seq_len", "loss", "perplexity", "in the last eighth", "targets", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.max_seq_len:,}",
            f"{one.losses.loss:.4f}",
            f"{perplexity(one.losses.loss):,.2f}",
            _at_the_end(one),
            f"{one.losses.targets:,}",
            f"{one.losses.targets / max(one.seconds, 1e-9):,.0f}",
        )
    console.print(table)
    if any(one.by_source for one in found):
        console.print(_sources_table(found))


def _sources_table(found: list[AtLength]) -> Table:
    """Loss of each source, one line a source and one column a length."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source", overflow="fold")
    for one in found:
        table.add_column(f"loss at {one.max_seq_len:,}", justify="right", no_wrap=True)
    table.add_column("targets", justify="right", no_wrap=True)
    for name in dict.fromkeys(name for one in found for name in one.by_source):
        each = [one.by_source.get(name) for one in found]
        losses = [f"{source.loss:.4f}" if source is not None else "-" for source in each]
        table.add_row(name, *losses, f"{max(source.targets for source in each if source is not None):,}")
    return table


def _at_the_end(one: AtLength) -> str:
    """Mean loss of the targets with the most context."""
    from_here = one.max_seq_len * 7 // 8
    sums, counts = one.losses.sums[from_here:].sum(), one.losses.counts[from_here:].sum()
    return f"{float(sums / counts):.4f}" if counts else "-"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
