"""How full packed rows are and what packing costs: llmtrain against llm-foundry 0.22.0, side by side, in CPU seconds.

    python scripts/benchmark/packing.py --foundry-python /path/to/python --out packing

llm-foundry runs in an environment of its own (it needs an older torch and transformers), as a subprocess that is told
when to do its rounds; the two take turns, so that what else the machine does falls on both. To make that environment:

    python3.11 -m venv /somewhere/foundry
    /somewhere/foundry/bin/pip install llm-foundry==0.22.0 'setuptools<81'      # a gigabyte of torch comes with it

Without --foundry-python its rows of the tables are left out.

Lengths are drawn so that their means are those of conversations like ShareGPT's that are cut at 2048, 4096 and 8192
tokens (about 950, 1100 and 1150), and of short chats (288 tokens at 2048). Efficiency is real tokens / (rows x row
length). llm-foundry packs `packing_ratio` x 8 examples into 8 rows at a time; what does not fit waits for the next
batch, and what waits at the end of the run is never trained on: that is called wasted. `auto` is the ratio that its own
search picks; "hand-set" is the one of all ratios from 1 to twice the perfect one, in steps of a tenth, that fills rows
best while it wastes at most one percent.

The cost is that of a whole pass over the examples: from ids and masks to packed tensors of 8 rows (ids, labels,
attention mask, sequence ids). llmtrain's is its plan (window 1024) and its collator, reading from a store on disk;
llm-foundry's is its BinPackCollator at the hand-set ratio, once alone and once with the padding of its input, which
it needs and its base collator does before (here in the plainest way; its own does more).
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from side import Side

from llmtrain.data.finetuning.collate import FinetuningCollator
from llmtrain.data.finetuning.packing import OnlinePacker
from llmtrain.data.finetuning.store import ExampleStore, StoreWriter

BATCH = 8
WINDOWS = (64, 256, 1024, 4096)
TIMED_WINDOW = 1024
WORKER = Path(__file__).with_name("packing_foundry.py")
SETS = {  # row length, median and spread (sigma) of a log-normal distribution
    "2048": (2048, 780, 0.9),
    "4096": (4096, 780, 0.9),
    "8192": (8192, 780, 0.9),
    "2048, short": (2048, 200, 0.85),
}
GOALS = {256: 0.98, 1024: 0.995}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundry-python", help="python of an environment with llm-foundry 0.22.0")
    parser.add_argument("--examples", type=int, default=10_000, help="of each set")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    foundry = Side([args.foundry_python, str(WORKER)]) if args.foundry_python else None
    with tempfile.TemporaryDirectory() as work:
        result = measure(args, foundry, Path(work))
    show(Console(), result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        draw(result, args.out.with_suffix(".png"))
    if foundry is not None:
        foundry.stop()


def measure(args: argparse.Namespace, foundry: Side | None, work: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llm_foundry": foundry.ask(do="versions") if foundry else None,
        "examples": args.examples,
        "rounds": args.rounds,
        "device_batch_size": BATCH,
        "timed_window": TIMED_WINDOW,
        "sets": {},
    }
    ways = {}
    for name, (seq_len, median, spread) in SETS.items():
        drawn = np.random.default_rng(seq_len + median).lognormal(np.log(median), spread, args.examples)
        lengths = np.clip(drawn.astype(int), 8, seq_len)
        found: dict[str, Any] = {"seq_len": seq_len, "mean_length": round(float(lengths.mean()))}
        found["fill"] = {"no packing": fill(lengths, seq_len, len(lengths))}
        for window in WINDOWS:
            rows = plan(lengths, seq_len, window)
            assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
            found["fill"][f"llmtrain, window {window}"] = fill(lengths, seq_len, len(rows))
        store = write_store(work / name.replace(", ", "-"), lengths)
        ways[name] = {"llmtrain": lambda s=store, n=seq_len: llmtrain_pass(s, n)}
        if foundry is not None:
            foundry.ask(do="lengths", set=name, seq_len=seq_len, lengths=lengths.tolist())
            auto = foundry.ask(do="auto", set=name, batch=BATCH)
            perfect = seq_len / lengths.mean()
            ratios = [round(ratio, 1) for ratio in np.arange(1, 2 * perfect, 0.1)]
            tried = foundry.ask(do="fill", set=name, batch=BATCH, ratios=[auto, *ratios])
            best = max((one for one in tried[1:] if one["wasted"] <= 0.01), key=lambda one: one["efficiency"])
            found["fill"]["llm-foundry, auto"] = tried[0]
            found["fill"]["llm-foundry, hand-set"] = best
            found["fullest_of_llm_foundry_whatever_it_wastes"] = max(tried[1:], key=lambda one: one["efficiency"])
            ways[name]["llm-foundry"] = lambda s=name, r=best["ratio"]: foundry.ask(
                do="time", set=s, batch=BATCH, ratio=r
            )
        result["sets"][name] = found
    for name, both in ways.items():
        for way in both.values():
            way()  # warm
        rounds = [{who: way() for who, way in both.items()} for _ in range(args.rounds)]
        result["sets"][name]["cpu_seconds"] = {who: [one[who] for one in rounds] for who in both}
    result["machine"] = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    return result


def plan(lengths: np.ndarray, seq_len: int, window: int) -> list[list[int]]:
    packer = OnlinePacker(seq_len, window)
    return packer.add(lengths.tolist()) + packer.finish()


def fill(lengths: np.ndarray, seq_len: int, rows: int) -> dict[str, float]:
    return {"efficiency": float(lengths.sum()) / (rows * seq_len), "wasted": 0.0}


def write_store(folder: Path, lengths: np.ndarray) -> ExampleStore:
    with StoreWriter(folder, vocab_size=50_432, source="benchmark") as writer:
        for length in lengths.tolist():
            ids = np.random.default_rng(length).integers(0, 50_000, length)
            writer.add(ids, np.arange(length) >= (length + 1) // 2, "")
    return ExampleStore(folder)


def llmtrain_pass(store: ExampleStore, seq_len: int) -> dict[str, float]:
    """CPU seconds of the plan and of the tensors of all its rows."""
    begin = time.process_time()
    rows = plan(store.lengths, seq_len, TIMED_WINDOW)
    middle = time.process_time()
    collate = FinetuningCollator(seq_len, 0, packed=True)
    for start in range(0, len(rows), BATCH):
        collate([[(store.ids(n), store.trained(n)) for n in row] for row in rows[start : start + BATCH]])
    return {"plan": middle - begin, "tensors": time.process_time() - middle}


def show(console: Console, result: dict[str, Any]) -> None:
    sets = result["sets"]
    table = Table(title=f"Real tokens in packed rows ({result['examples']:,} examples; in brackets: wasted)")
    table.add_column("", no_wrap=True)
    for name, found in sets.items():
        table.add_column(f"{name}\nmean {found['mean_length']}", justify="right")
    for method in next(iter(sets.values()))["fill"]:
        cells = []
        for found in sets.values():
            one = found["fill"][method]
            ratio = f" at {one['ratio']:g}" if "ratio" in one else ""
            wasted = f" ({one['wasted']:.1%})" if method != "no packing" else ""
            cells.append(f"{one['efficiency']:.2%}{ratio}{wasted}")
        table.add_row(method, *cells)
    console.print(table)

    size = 10_000 / result["examples"]
    costs = Table(title=f"CPU ms per 10,000 examples (median of {result['rounds']} rounds)")
    costs.add_column("", no_wrap=True)
    for name in sets:
        costs.add_column(name, justify="right")
    for who, parts in (("llmtrain", ("plan", "tensors")), ("llm-foundry", ("pack", "pad"))):
        for part in parts:
            if all(who in found["cpu_seconds"] for found in sets.values()):
                times = [statistics.median(one[part] for one in found["cpu_seconds"][who]) for found in sets.values()]
                costs.add_row(f"{who}, {part}", *(f"{t * size * 1000:.0f}" for t in times))
    for title, parts in (
        ("times llmtrain: packing alone", ("pack",)),
        ("times llmtrain: with padding", ("pack", "pad")),
    ):
        ratios = [times_llmtrain(found["cpu_seconds"], parts) for found in sets.values()]
        if None not in ratios:
            costs.add_row(title, *(f"{r:.1f}" for r in ratios))
    console.print(costs)
    for window, goal in GOALS.items():
        worst = min(found["fill"][f"llmtrain, window {window}"]["efficiency"] for found in sets.values())
        console.print(f"window {window}: {worst:.2%} at worst (goal {goal:.1%}); nothing wasted")


def times_llmtrain(seconds: dict[str, list[dict[str, float]]], parts: tuple[str, ...]) -> float | None:
    """Median over the rounds of llm-foundry's time for its parts over llmtrain's for all."""
    if "llm-foundry" not in seconds:
        return None
    pairs = zip(seconds["llm-foundry"], seconds["llmtrain"], strict=True)
    return statistics.median(sum(theirs[part] for part in parts) / sum(ours.values()) for theirs, ours in pairs)


def draw(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [
        *("no packing", "llm-foundry, auto", "llm-foundry, hand-set"),
        *(f"llmtrain, window {window}" for window in (256, 1024)),
    ]
    methods = [method for method in methods if method in result["sets"]["2048"]["fill"]]
    colours = dict(zip(methods, ["#c7c7c7", "#f2b880", "#d9822b", "#7fb3d5", "#1f618d"], strict=False))
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        values = [100 * found["fill"][method]["efficiency"] for found in result["sets"].values()]
        places = np.arange(len(values)) + (number - (len(methods) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.92, label=method, color=colours[method])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=6.5, padding=1)
    axes.set_xticks(range(len(result["sets"])), [f"rows of {name}" for name in result["sets"]])
    axes.set_ylim(0, 112)
    axes.set_ylabel("real tokens in a row, %")
    axes.set_title("How full rows of conversations are", fontsize=11)
    axes.legend(ncols=len(methods), fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.09), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
