"""Tokens per second of the text loader: llmtrain against llm-foundry 0.22.0 on the same shards, side by side.

    python scripts/benchmark/loader.py --foundry-python /path/to/python --out docs/images/loader

Both sides run as subprocesses that are told when to read an epoch; they take turns, so that what else the machine does
falls on both. A round reads every row once, shuffled, in rows of 2048 tokens and batches of 8, as training does:
tensors of ids, labels and sequence ids come out, and their ids are added up (the sums have to agree). CPU seconds are
those of the process and its workers. With workers, an epoch begins with their start. Ratios are medians of the rounds'.

To make llm-foundry's environment:

    python3.11 -m venv /somewhere/foundry
    /somewhere/foundry/bin/pip install llm-foundry==0.22.0 'setuptools<81'      # a gigabyte of torch comes with it

Without --foundry-python its rows of the table are left out.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from side import Side

SEQ_LEN, BATCH, VOCAB = 2048, 8, 50_432
OURS, THEIRS = "llmtrain", "llm-foundry"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundry-python", help="python of an environment with llm-foundry 0.22.0")
    parser.add_argument("--rows", type=int, default=16_384, help="of 2048 tokens, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve()
        return
    sides = {OURS: Side([sys.executable, __file__, "--worker"])}
    if args.foundry_python:
        sides[THEIRS] = Side([args.foundry_python, str(Path(__file__).with_name("loader_foundry.py"))])
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "shards", args.rows)
        result = measure(args, sides, str(Path(folder) / "shards"))
    for side in sides.values():
        side.stop()
    show(Console(), result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        draw(result, args.out.with_suffix(".png"))


def write_shards(folder: Path, rows: int) -> None:
    """Rows of ids as `llmtrain prep` writes them, not compressed."""
    from llmtrain.prep.mds import ShardWriter

    random = np.random.default_rng(17)
    with ShardWriter(
        folder, seq_len=SEQ_LEN, dtype=np.dtype(np.uint16), compression=None, size_limit=1 << 26
    ) as writer:
        for start in range(0, rows, 1024):
            ids = random.integers(0, VOCAB, (min(1024, rows - start), SEQ_LEN))
            writer.write(ids.astype(np.uint16))


def measure(args: argparse.Namespace, sides: dict[str, Side], folder: str) -> dict[str, Any]:
    task = {
        "do": "read",
        "folder": folder,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH,
        "batches": args.rows // BATCH,
    }
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for workers in args.workers:
        for side in sides.values():
            side.ask(**task, workers=workers)  # warm
        rounds = [{name: side.ask(**task, workers=workers) for name, side in sides.items()} for _ in range(args.rounds)]
        sums = {one["sum"] for each in rounds for one in each.values()}
        if len(sums) != 1:
            raise SystemExit(f"the sides did not read the same rows: {sums}")
        runs[str(workers)] = {name: [each[name] for each in rounds] for name in sides}
    return {
        "python": platform.python_version(),
        "versions": {name: side.ask(do="versions") for name, side in sides.items()},
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "tokens": args.rows * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "batch_size": BATCH,
        "rounds": args.rounds,
        "workers": runs,
    }


def rate(result: dict[str, Any], workers: str, side: str, clock: str = "wall") -> float:
    """Median of tokens per second."""
    return statistics.median(result["tokens"] / one[clock] for one in result["workers"][workers][side])


def ratio(result: dict[str, Any], workers: str, clock: str) -> float | None:
    """Median over the rounds of llm-foundry's seconds over llmtrain's."""
    both = result["workers"][workers]
    if THEIRS not in both:
        return None
    return statistics.median(b[clock] / a[clock] for a, b in zip(both[OURS], both[THEIRS], strict=True))


def show(console: Console, result: dict[str, Any]) -> None:
    table = Table(
        title=f"Million tokens/s, rows of {result['seq_len']} (median of {result['rounds']}; {result['machine']})"
    )
    for column in ("workers", "", "by the clock", "per CPU second", "clock ratio", "CPU ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for workers, sides in result["workers"].items():
        for side in sides:
            ratios = [ratio(result, workers, clock) if side == OURS else None for clock in ("wall", "cpu")]
            cells = [f"{rate(result, workers, side, clock) / 1e6:.1f}" for clock in ("wall", "cpu")]
            table.add_row(workers, side, *cells, *("" if r is None else f"{r:.1f}" for r in ratios))
    console.print(table)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    sides = list(next(iter(result["workers"].values())))
    for number, side in enumerate(sides):
        values = [rate(result, workers, side) / 1e6 for workers in result["workers"]]
        places = np.arange(len(values)) + (number - (len(sides) - 1) / 2) * 0.38
        bars = axes.bar(places, values, 0.36, label=side, color={OURS: "#1f618d", THEIRS: "#d9822b"}[side])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=8, padding=1)
    axes.set_xticks(range(len(result["workers"])), [f"{workers} workers" for workers in result["workers"]])
    axes.set_ylabel("million tokens/s")
    axes.set_title(f"Reading tokenised shards, rows of {result['seq_len']}", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def serve() -> None:
    """llmtrain's side."""
    import torch

    torch.set_num_threads(1)
    loaders: dict[int, Any] = {}
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "versions":
            answer: object = f"torch {torch.__version__}"
        else:
            workers = task["workers"]
            if workers not in loaders:
                loaders[workers] = build(task["folder"], task["batch_size"], workers)
            answer = timed(loaders[workers], task["batches"])
        print(f"answer: {json.dumps(answer)}", flush=True)


def build(folder: str, batch_size: int, workers: int) -> Any:
    from llmtrain.data.config import TextLoaderConfig
    from llmtrain.data.text import build_text_loader

    dataset = {"local": folder, "max_seq_len": SEQ_LEN, "shuffle": True, "shuffle_seed": 17, "eos_token_id": 0}
    how = {"num_workers": workers, "persistent_workers": False, "pin_memory": False}
    cfg = TextLoaderConfig.model_validate({"dataset": {**dataset, "num_canonical_nodes": 1}, **how})
    return build_text_loader(
        cfg, eos_token_id=0, tokenizer_fingerprint="", vocab_size=VOCAB, device_batch_size=batch_size
    )


def timed(loader: Any, batches: int) -> dict[str, float]:
    """Seconds of an epoch, by the clock and of the processor, workers included; and a checksum."""
    before, clock = cpu_seconds(), time.perf_counter()
    sums = [int(batch["input_ids"].sum()) for batch in loader]
    assert len(sums) == batches
    return {"wall": time.perf_counter() - clock, "cpu": cpu_seconds() - before, "sum": sum(sums)}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
