"""Tables and the picture of step.py."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(console: Console, result: dict[str, Any], only: str | None = None) -> None:
    """Prints a line a case and model; `only` one case."""
    cases = {name: found for name, found in result["cases"].items() if only in (None, name)}
    on_gpu = any(one.get("device") not in (None, "CPU") for found in cases.values() for one in found["models"].values())
    rounds = result["settings"]["rounds"]
    table = Table(title=f"{result['clock']} seconds a step, median of {rounds} rounds; ratios: first model / this one")
    table.add_column("case", no_wrap=True)
    table.add_column("model", no_wrap=True)
    columns = ["s", "ratio", "peak MB", "ratio", "tokens/s", "MFU"] if on_gpu else ["s", "ratio", "peak MB", "ratio"]
    for column in [*columns, "error", "kernel"]:
        table.add_column(column, justify="right")
    for case, found in cases.items():
        for name, one in found["models"].items():
            table.add_row(case, name, *cells(one, on_gpu))
            case = ""
        if found["losses_apart"]:
            table.add_row("", f"LOSSES DIFFER by {found['loss_difference']:.1e}")
    console.print(table)


def cells(one: dict[str, Any], on_gpu: bool) -> list[str]:
    if "seconds" not in one:
        return [one.get("failed", "not run")]
    time_ratio, memory_ratio = (f"{one[key]:.2f}" if key in one else "-" for key in ("time_ratio", "memory_ratio"))
    row = [f"{one['seconds']:.3g}", time_ratio, f"{one['peak_bytes'] / 1e6:.0f}", memory_ratio]
    if on_gpu:
        row += [f"{one['tokens_per_second']:,.0f}", "-" if one["mfu"] is None else f"{one['mfu']:.1%}"]
    error = one.get("error", {}).get("max")
    kept = one.get("kept")
    kernel = one.get("kernel", "") + (f", {kept:.0%} of pairs" if kept is not None else "")
    return [*row, "-" if error is None else f"{error:.1e}", kernel]


def draw(result: dict[str, Any], path: Path) -> None:
    """Step time and peak memory of each model in each case, relative to the largest; the figures stand beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["cases"]
    names = list(dict.fromkeys(name for found in cases.values() for name in found["models"]))
    palette = ["#1f618d", "#d9822b", "#c7c7c7", "#7fb3d5", "#f2b880", "#8e44ad"]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    figure, both = pyplot.subplots(1, 2, figsize=(11, 1.2 + 0.2 * len(names) * len(cases)), sharey=True)
    height = 0.8 / len(names)
    for axes, key, unit, title in (
        (both[0], "seconds", 1.0, f"{result['clock']} seconds a step"),
        (both[1], "peak_bytes", 1e9, "peak memory, GB"),
    ):
        for place, found in enumerate(cases.values()):
            largest = max((one[key] for one in found["models"].values() if key in one), default=1.0)
            for name, one in found["models"].items():
                y = place + (names.index(name) - (len(names) - 1) / 2) * height
                axes.barh(y, one.get(key, 0.0) / largest, height * 0.9, color=colours[name])
                label = f"{one[key] / unit:.3g}" if key in one else one.get("failed", "not run")[:40]
                axes.text(one.get(key, 0.0) / largest + 0.01, y, label, fontsize=7, va="center")
        axes.set_xlim(0, 1.12)
        axes.set_xticks([])
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    both[0].set_yticks(range(len(cases)), list(cases), fontsize=8)
    both[0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    both[0].legend(
        handles, names, ncols=len(names), fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02), frameon=False
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
