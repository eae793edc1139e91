"""What a checkpoint costs the training: saved beside it, against saved while it waits; a real run of two ranks.

    python scripts/benchmark/save.py [--d-model 768] [--layers 14] [--pairs 6] [--every 3]

Both ways take turns within one run, and each save beside the training is compared with the one after it, so that other
work on the machine hits both. The median of these ratios is what counts.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

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
            max_duration=f"{(2 * options.pairs + 3) * options.every}ba",
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


def report(rows: list[dict[str, float | bool | str | None]], size: str, pairs: int) -> None:
    """Prints the table; the first save of each way, which allocates memory, is left out."""
    saves = [(str(row["way"]), float(row["stall"] or 0)) for row in rows if row["way"]][2:]
    beside = [stall for way, stall in saves if way == "beside"][:pairs]
    waiting = [stall for way, stall in saves if way == "waiting"][:pairs]
    ratios = [one / other for one, other in zip(beside, waiting, strict=False)]
    quiet = [float(row["seconds"] or 0) for row in rows if not row["beside_a_save"]]
    busy = [float(row["seconds"] or 0) for row in rows if row["beside_a_save"]]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"checkpoint: {size}")
    print(f"stall of a save with waiting, median:    {statistics.median(waiting):8.3f} s")
    print(f"stall of a save beside, median:          {statistics.median(beside):8.3f} s")
    print(f"ratio, median of {len(ratios)} pairs:              {statistics.median(ratios):8.1%}")
    print(f"ratios: {', '.join(f'{ratio:.1%}' for ratio in ratios)}")
    print(f"step with no save in flight, median:     {statistics.median(quiet):8.3f} s")
    if busy:
        print(f"step with a save in flight, median:      {statistics.median(busy):8.3f} s ({len(busy)} steps)")


if __name__ == "__main__":
    main()
