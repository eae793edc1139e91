"""The picture of losses by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtrain.evaluation.by_position import Bin


def draw_loss_by_position(curves: Mapping[str, Sequence[Bin]], title: str, picture: Path) -> None:
    """Draw one curve for each evaluation, over the position in the window; below, how many targets a point stands for.

    Where all curves are of the same targets, a panel between them has each curve's difference to the first one: how
    easy the text is at a position, which with few windows is most of a curve, falls out of it.

    Args:
        curves: label -> bins, in the order of the legend. The overall loss is added to the label.
        title: above it.
        picture: PNG to write, atomically.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = _same_targets(list(curves.values()))
    heights = (4, 2, 1) if compared else (4, 1)
    figure, (losses, *between, counts) = plt.subplots(
        len(heights), 1, figsize=(8, 8 if compared else 6), sharex=True, height_ratios=heights, layout="constrained"
    )
    first = next(iter(curves.values()), ())
    for number, (label, bins) in enumerate(curves.items()):
        if not bins:
            continue
        targets = sum(b.targets for b in bins)
        mean = sum(b.loss * b.targets for b in bins) / targets
        edges = [bins[0].first, *(b.last + 1 for b in bins)]
        middles = [(b.first * b.last) ** 0.5 for b in bins]
        color = f"C{number % 10}"
        losses.plot(middles, [b.loss for b in bins], ".-", color=color, label=f"{label}: {mean:.3f} over all")
        losses.axhline(mean, color=color, alpha=0.5, linewidth=0.8, linestyle="--")
        for axes in between:
            axes.plot(middles, [b.loss - a.loss for a, b in zip(first, bins, strict=True)], ".-", color=color)
        counts.stairs([b.targets for b in bins], edges, color=color)
    losses.set_ylabel("cross-entropy (nats per token)")
    losses.set_title(title)
    losses.legend()
    for axes in between:
        axes.set_ylabel("difference to the first")
    counts.set_ylabel("targets")
    counts.set_yscale("log")
    counts.set_xlabel("position in the window (tokens before the target)")
    for axes in (losses, *between, counts):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.grid(alpha=0.3)
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(picture)


def _same_targets(curves: Sequence[Sequence[Bin]]) -> bool:
    """Whether there are several curves, and their bins are the same."""
    edges = [[(b.first, b.last, b.targets) for b in bins] for bins in curves]
    return len(edges) > 1 and bool(edges[0]) and all(each == edges[0] for each in edges)
