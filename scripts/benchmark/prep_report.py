"""Table and picture of prep.py's figures."""

from pathlib import Path
from typing import Any

import matplotlib

COLOURS = {"llmtrain": "#1f618d", "llm-foundry": "#d9822b", "datatrove": "#7d8a5c"}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| MB | contender | wall s | CPU s | MB/s | tokens/s | MB per CPU s | peak MB | largest process | same ids |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for size, found in result["sizes"].items():
        for name, one in found["summary"].items():
            row = [size, name, f"{one['wall']:.2f}", f"{one['cpu']:.2f}", f"{one['mb_per_s']:.2f}"]
            row += [f"{one['tokens_per_s']:,.0f}", f"{one['mb_per_cpu']:.2f}", f"{one['peak_mb']:.0f}"]
            row += [f"{one['peak_of_one_mb']:.0f}", "yes" if found["same_ids"][name] else "NO"]
            lines.append(f"| {' | '.join(row)} |")
        core = sorted(found["core_cpu"])[len(found["core_cpu"]) // 2]
        lines.append(f"| {size} | tokenizer's core alone | | {core:.2f} | | | {found['megabytes'] / core:.2f} | | | |")
    lines += [
        "",
        "| MB | times the figure of | is that of | CPU s | wall s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for size, found in result["sizes"].items():
        for pair, times in found["times_faster"].items():
            peer, mine = pair.split(" / ")
            figures = " | ".join(f"{times[key]:.1f}" for key in ("cpu", "wall", "peak_mb"))
            lines.append(f"| {size} | {mine} | {peer} | {figures} |")
    growth = result["growth"]
    if growth:
        lines += [
            "",
            "| | CPU s per further MB | wall s per further MB | MB of memory per further MB |",
            "|---|---|---|---|",
        ]
        for name, one in growth.items():
            figures = [
                f"{one[key]:.4f}" if key in one else "" for key in ("cpu_per_mb", "wall_per_mb", "peak_mb_per_mb")
            ]
            lines.append(f"| {name} | {' | '.join(figures)} |")
        one = next(name for name in growth if name.startswith("llmtrain"))
        share = growth["core"]["cpu_per_mb"] / growth[one]["cpu_per_mb"]
        lines += ["", f"Of the CPU time that a further megabyte takes ({one}), {share:.0%} is the tokenizer's core."]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(result["sizes"].values())
    titles = {"wall": "seconds on the wall", "cpu": "CPU seconds", "peak_mb": "peak memory, MB"}
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.8))
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name in sizes[0]["summary"]:
            did = [found for found in sizes if name in found["summary"]]
            colour = next(colour for who, colour in COLOURS.items() if name.startswith(who))
            axis.plot(
                [found["megabytes"] for found in did],
                [found["summary"][name][key] for found in did],
                marker="o",
                markersize=4,
                color=colour,
                linestyle="--" if "2 proc." in name else "-",
                label=name,
            )
        if key == "cpu":
            core = [sorted(found["core_cpu"])[len(found["core_cpu"]) // 2] for found in sizes]
            axis.plot([found["megabytes"] for found in sizes], core, color="#888888", linestyle=":", label="core alone")
        axis.set(xscale="log", yscale="log", xlabel="MB of text", title=title)
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
