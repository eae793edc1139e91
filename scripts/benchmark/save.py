"""What a checkpoint costs the training: saved beside it, against saved while it waits; a real run of two ranks.

    python scripts/benchmark/save.py [--d-model 768] [--layers 14] [--pairs 6] [--every 3]

Both ways take turns within one run, and each save beside the training is compared with the one after it, so that other
work on the machine hits both. Two costs are told, because either alone misleads:

    stall       for how long the training stands still in the call that saves
    in all      the stall, by how much the steps until the next save are slower than steps with no save in flight, and
                the wait for a save that is not done when the next one is due
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmtrain.testing.corpus import tiny_corpus
from llmtrain.testing.launch import launch
from llmtrain.testing.recipe import tiny_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--every", type=int, default=3, help="steps from a save to the next")
    parser.add_argument("--folder", type=Path, help="where checkpoints go, on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="save-benchmark-") as name:
        folder = Path(name)
        os.environ["SAVE_BENCHMARK"] = str(folder / "steps.jsonl")
        corpus = tiny_corpus(folder / "corpus")
        recipe = tiny_recipe(
            folder / "save.yaml",
            corpus,
            model={
                "name": "mpt_causal_lm",
                "init_device": "mixed",
                "d_model": options.d_model,
                "n_heads": options.d_model // 64,
                "n_layers": options.layers,
                "vocab_size": corpus.vocab_size,
                "no_bias": True,
                "attn_config": {"alibi": True},
            },
            global_train_batch_size=2,
            device_train_microbatch_size=1,
            eval_loader=None,
            max_duration=f"{(2 * options.pairs + 4) * options.every}ba",
            save_interval=f"{options.every}ba",
            save_num_checkpoints_to_keep=1,
            code_paths=[str(Path(__file__).with_name("save_probe.py").resolve())],
        )
        run = launch(recipe, ranks=2, cwd=folder)
        if run.code:
            raise SystemExit(run.output)
        rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        print("\n".join(line for line in run.output.splitlines() if line.startswith(("saving", "model"))))
        size = next(line for line in run.output.splitlines() if line.startswith("checkpoint")).split("(")[1]
    report(rows, size.split(",")[0] if "MB" in size.split(",")[0] else size, options.pairs)


def report(rows: list[dict[str, Any]], checkpoint: str, pairs: int) -> None:
    """Prints the table; the first save of each way, which allocates memory, is left out."""
    quiet = statistics.median(row["seconds"] for row in rows if not row["beside_a_save"])
    busy = [row["seconds"] for row in rows if row["beside_a_save"]]
    saves = _saves(rows, quiet)[2:]
    beside = [save for save in saves if save["way"] == "beside"][:pairs]
    waiting = [save for save in saves if save["way"] == "waiting"][:pairs]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"checkpoint: {checkpoint}; {len(beside)} pairs; seconds are medians")
    print(f"{'':<52}{'beside':>10}{'waiting':>10}{'ratio, median and range of the pairs':>42}")
    for key, what in (
        ("stall", "training stands still in the call"),
        ("in_all", "the same, slower steps and waits for it"),
        ("gather", "  of the call: collecting the state"),
        ("copy", "  of the call: copying tensors"),
        ("plan", "  of the call: planning, pickling objects"),
        ("stall_cpu", "  of the call: CPU time of its thread"),
    ):
        medians = [statistics.median(save[key] for save in way) for way in (beside, waiting)]
        ratios = [one[key] / other[key] for one, other in zip(beside, waiting, strict=False) if other[key] > 0]
        shown = f"{statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})" if ratios else ""
        print(f"{what:<52}{medians[0]:>9.3f}s{medians[1]:>9.3f}s{shown:>42}")
    print(f"step with no save in flight: {quiet:.3f} s")
    if busy:
        print(f"step with a save in flight:  {statistics.median(busy):.3f} s ({len(busy)} steps)")


def _saves(rows: list[dict[str, Any]], quiet: float) -> list[dict[str, Any]]:
    """One entry a save: its own row, and by how much the steps until the next one were slower than `quiet` seconds."""
    starts = [number for number, row in enumerate(rows) if "way" in row]
    found = []
    for start, end in zip(starts, [*starts[1:], len(rows) - 1], strict=True):
        save, after = rows[start], rows[start + 1 : end + 1]
        slower = sum(row["seconds"] - quiet for row in after)
        waited = after[-1].get("waited", 0.0) if after else 0.0
        plan = save["take"] - save.get("copy", 0.0)
        found.append({"copy": 0.0, **save, "plan": plan, "in_all": save["stall"] + slower + waited})
    return found


if __name__ == "__main__":
    main()
