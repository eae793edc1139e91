"""The picture of losses by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtrain.evaluation.by_position import Bin


def draw_loss_by_position(curves: Mapping[str, Sequence[Bin]], title: str, picture: Path) -> None:
    """Draw one curve for each evaluation, over the position in the window; below, how many targets a point stands for.

    Args:
        curves: label -> bins, in the order of the legend. The overall loss is added to the label.
        title: above it.
        picture: PNG to write, atomically.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, counts) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
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
        counts.stairs([b.targets for b in bins], edges, color=color)
    losses.set_ylabel("cross-entropy (nats per token)")
    losses.set_title(title)
    losses.legend()
    counts.set_ylabel("targets")
    counts.set_yscale("log")
    counts.set_xlabel("position in the window (tokens before the target)")
    for axes in (losses, counts):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.grid(alpha=0.3)
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    temporary.replace(picture)
