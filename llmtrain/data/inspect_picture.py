"""The picture of `llmtrain data inspect`: how long the documents are, and how often which tokens occur."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.inspect_counts import Lengths


class Drawn(NamedTuple):
    """One folder in the picture."""

    label: str
    lengths: Lengths
    by_rank: NDArray[np.int64]
    """Counts of the tokens in decreasing order; empty for text."""


def draw(folders: Sequence[Drawn], what: str, unit: str, picture: Path, *, row_length: int | None = None) -> None:
    """Draw one curve for each folder.

    Args:
        folders: in the order of the legend.
        what: `documents` or `rows`.
        unit: of their lengths: `tokens` or `bytes`.
        picture: PNG to write, atomically.
        row_length: tokens in a row, marked in the histogram.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with_tokens = any(len(folder.by_rank) for folder in folders)
    panels = 3 if with_tokens else 2
    figure, found = plt.subplots(panels, 1, figsize=(8, 3.4 * panels), layout="constrained")
    counts, masses, *ranks = found
    for number, folder in enumerate(folders):
        color = f"C{number % 10}"
        edges, values = folder.lengths.histogram(4)
        first, last = np.maximum(np.array(edges[:-1], float), 0.5), np.maximum(np.array(edges[1:], float) - 1, 0.5)
        mean, median = folder.lengths.mean, folder.lengths.quantile(0.5)
        label = f"{folder.label}: {folder.lengths.n:,}, median {median:,}, mean {mean:,.0f}"
        counts.stairs(values, edges, color=color, label=label, fill=len(folders) == 1, alpha=0.8)
        mass = np.sqrt(first * last) * values
        masses.stairs(100 * mass / max(1.0, mass.sum()), edges, color=color, fill=len(folders) == 1, alpha=0.8)
        for axes in ranks:
            n = len(folder.by_rank)
            shown = np.unique(np.geomspace(1, max(1, n), 400).astype(int)) if n else np.zeros(0, int)
            share = folder.by_rank[shown - 1] / max(1, folder.by_rank.sum())
            axes.plot(shown, share, color=color, label=f"{folder.label}: {n:,} ids occur")
    for axes in (counts, masses):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel(f"length ({unit})")
        axes.grid(alpha=0.3)
        if row_length is not None:
            axes.axvline(row_length, color="black", linestyle="--", linewidth=0.8, label=f"a row: {row_length:,}")
    counts.set_ylabel(what)
    counts.set_ylim(bottom=0)
    counts.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    counts.set_title(f"How long the {what} are")
    counts.legend(fontsize="small")
    masses.set_ylabel(f"% of the {unit}")
    masses.set_title(f"Where the {unit} are: share that stands in {what} of a length")
    for axes in ranks:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank of the token")
        axes.set_ylabel("share of all tokens")
        axes.set_title("How often tokens occur")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(picture)
