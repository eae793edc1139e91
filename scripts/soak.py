"""Does a long run stay flat? Trains a tiny model on ranks of this machine and watches what its processes hold.

    python scripts/soak.py --out soak            # 5,000 steps: some minutes; soak/soak.{json,csv,png}

Evaluation, asynchronous saves, retention and loader workers run all the time, as in a long run, only far more often a
second. Every rank is looked at from outside, through /proc, once a second:

    memory      anonymous resident memory of the rank (RssAnon), without libraries and shared memory; ranks are forked
                here, and pages that they stop sharing with their parent do not count twice
    workers     the same of its loader workers and other children, together
    files       open file descriptors          threads     of the rank
    segments    distinct files of /dev/shm that the rank or a child maps
    children    processes below the rank       checkpoints entries of the save folder

The first fifth is warm-up: caches fill, the allocator takes its arenas, the first export and saves run. A straight line
is fitted to the rest. Memory may rise by BOUND a step: 1 KB, which would be 1 GB in a million steps. A tensor that is
forgotten is more than that; a float that is kept, 32 bytes a step, is not found, and does not matter. The line's own
uncertainty is printed beside it. Counts may not be higher in the last quarter than in the first after the warm-up by
more than COUNTS (medians): a descriptor that each save or evaluation forgets would be dozens.
Exit code 1 when anything grew, or the run failed.
"""

import argparse
import csv
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

import psutil

BOUND = 1.0
"""KB a step."""
COUNTS = 2
WARM_UP = 0.2
MEMORY = ("memory", "workers")
COUNTED = ("files", "threads", "segments", "children", "checkpoints")


@dataclass(frozen=True)
class Sample:
    """What one rank held at a moment; memory in KB."""

    seconds: float
    step: int
    rank: int
    memory: float
    rss: float
    workers: float
    files: int
    threads: int
    segments: int
    children: int
    checkpoints: int


@dataclass(frozen=True)
class Growth:
    """What became of one quantity of one rank.

    Attributes:
        rank: whose.
        what: a field of Sample.
        begins: median of the first quarter after the warm-up.
        ends: median of the last quarter.
        slope: of the line, a step.
        error: the slope's standard error.
        grew: beyond the bound.
    """

    rank: int
    what: str
    begins: float
    ends: float
    slope: float
    error: float
    grew: bool


def growths(samples: Sequence[Sample], last_step: int, bound: float = BOUND) -> list[Growth]:
    """Every quantity of every rank, after the warm-up."""
    found = []
    for rank in sorted({sample.rank for sample in samples}):
        mine = [sample for sample in samples if sample.rank == rank and sample.step >= WARM_UP * last_step]
        if len(mine) < 8:
            raise SystemExit(f"rank {rank}: {len(mine)} samples after the warm-up are too few to say anything")
        quarter, usual = len(mine) // 4, statistics.median(sample.children for sample in mine)
        for what in (*MEMORY, *COUNTED):
            values = [float(getattr(sample, what)) for sample in mine]
            # An export is a process of its own for some seconds; one that stays is found among the children.
            seen = [each for each in mine if what != "workers" or each.children <= usual]
            slope, error = line([each.step for each in seen], [float(getattr(each, what)) for each in seen])
            begins, ends = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
            grew = slope > bound if what in MEMORY else ends > begins + COUNTS
            found.append(Growth(rank, what, begins, ends, slope, error, grew))
    return found


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error; 0 where x does not change."""
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        return 0.0, 0.0
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, (rest / max(len(x) - 2, 1) / spread) ** 0.5


def look(rank: int, pid: int, seconds: float, step: int, save_folder: Path) -> Sample | None:
    """One sample; None when the rank has ended."""
    try:
        process = psutil.Process(pid)
        below = process.children(recursive=True)
        return Sample(
            seconds=round(seconds, 2),
            step=step,
            rank=rank,
            memory=_anonymous(pid),
            rss=process.memory_info().rss / 1024,
            workers=sum(_anonymous(child.pid) for child in below),
            files=process.num_fds(),
            threads=process.num_threads(),
            segments=len(set().union(*(_segments(each.pid) for each in (process, *below)))),
            children=len(below),
            checkpoints=len(list(save_folder.iterdir())) if save_folder.is_dir() else 0,
        )
    except (psutil.Error, OSError):
        return None


def _anonymous(pid: int) -> float:
    """RssAnon in KB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0.0)


def _segments(pid: int) -> set[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    # Those that were unlinked keep their inode.
    return {f"{fields[4]} {fields[5]}" for line in lines if "/dev/shm/" in line and (fields := line.split(None, 5))}


def soak(folder: Path, record: TextIO, steps: int, ranks: int, interval: float, export: bool) -> list[Sample]:
    """Trains in `folder` and watches; what is seen goes to the CSV file `record` at once.

    Raises:
        SystemExit: the run failed.
    """
    from llmtrain.launching.progress import progress
    from llmtrain.testing.corpus import tiny_corpus
    from llmtrain.testing.launch import Run
    from llmtrain.testing.recipe import tiny_recipe

    corpus = tiny_corpus(folder / "corpus")
    every = max(steps // 50, 10)
    exporter = {"save_folder": "exports", "save_interval": f"{max(steps // 4, 1)}ba"}
    callbacks = {"hf_checkpointer": exporter} if export else None
    recipe = tiny_recipe(
        folder / "soak.yaml",
        corpus,
        max_duration=f"{steps}ba",
        save_interval=f"{every}ba",
        save_num_checkpoints_to_keep=3,
        eval_interval=f"{every * 2}ba",
        console_log_interval=f"{every * 5}ba",
        train_loader={
            "name": "text",
            "dataset": {"local": str(corpus.train), "shuffle": True, "num_canonical_nodes": 4},
            "num_workers": 1,
        },
        callbacks=callbacks,
    )
    run = Run(recipe, ranks=ranks, cwd=folder)
    samples: list[Sample] = []
    writer = csv.DictWriter(record, [field.name for field in fields(Sample)])
    writer.writeheader()
    began = time.monotonic()
    while any(process.is_alive() for process in run.processes):
        reached = max(0, progress(run.folder, None).step)
        for rank, process in enumerate(run.processes):
            if reached and process.pid is not None:
                sample = look(rank, process.pid, time.monotonic() - began, reached, run.folder / "checkpoints")
                if sample is not None and reached < steps:  # what follows the last step is the end of the run
                    samples.append(sample)
                    writer.writerow(asdict(sample))
                    record.flush()
        if any(process.exitcode for process in run.processes):
            break
        time.sleep(interval)
    finished = run.wait(600)
    if finished.code != 0:
        raise SystemExit(f"the run failed with exit code {finished.code}:\n{finished.output[-4000:]}")
    return samples


def table(found: Sequence[Growth]) -> str:
    """What is printed."""
    lines = [f"{'rank':>4}  {'what':<12}{'begins':>12}{'ends':>12}{'a step':>22}"]
    for growth in found:
        scale, unit = (1024, "MB") if growth.what in MEMORY else (1, "")
        a_step = f"{growth.slope:+.3f} ± {growth.error:.3f} KB" if unit else ""
        lines.append(
            f"{growth.rank:>4}  {growth.what:<12}{growth.begins / scale:>9.1f} {unit:<2}{growth.ends / scale:>9.1f} "
            f"{unit:<2}{a_step:>22}{'   GREW' if growth.grew else ''}"
        )
    return "\n".join(lines)


def draw(samples: Sequence[Sample], path: Path) -> None:
    """One panel a quantity, one line a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = (*MEMORY, *COUNTED[:-1])
    figure, panels = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    last = max(sample.step for sample in samples)
    for axes, what in zip(panels.flat, names, strict=True):
        for rank in sorted({sample.rank for sample in samples}):
            mine = [sample for sample in samples if sample.rank == rank]
            scale = 1024 if what in MEMORY else 1
            axes.plot([s.step for s in mine], [getattr(s, what) / scale for s in mine], label=f"rank {rank}", lw=1)
        axes.axvspan(0, WARM_UP * last, color="0.92", zorder=0)
        axes.set(title=f"{what} (MB)" if what in MEMORY else what, xlabel="step", ylim=(0, None))
    panels.flat[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    parser.add_argument("--bound", type=float, default=BOUND, help="KB that memory may grow a step")
    parser.add_argument("--no-export", action="store_true", help="without exports by hf_checkpointer")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder of the report")
    given = parser.parse_args(arguments)

    import torch

    given.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (
        (given.out / "soak.csv").open("w", newline="") as record,
        tempfile.TemporaryDirectory(prefix="llmtrain-soak-") as folder,
    ):
        samples = soak(Path(folder), record, given.steps, given.ranks, given.interval, not given.no_export)
    seconds = time.monotonic() - began
    found = growths(samples, given.steps, given.bound)
    print(table(found))
    report = {
        "steps": given.steps,
        "ranks": given.ranks,
        "seconds": round(seconds),
        "samples": len(samples),
        "bound_kb_a_step": given.bound,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "growths": [asdict(growth) for growth in found],
    }
    (given.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(samples, given.out / "soak.png")
    bad = [f"rank {growth.rank}: {growth.what}" for growth in found if growth.grew]
    print(f"{given.steps} steps in {seconds:.0f} s: " + (f"GREW: {', '.join(bad)}" if bad else "nothing grew"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
