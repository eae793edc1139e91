"""What looking at each step before its update costs: the share of a step's time, on this machine.

    python scripts/benchmark/bad_steps.py [--d-model 512 --n-layers 8 --steps 40]
    composer -n 2 scripts/benchmark/bad_steps.py

Trains a real recipe on a small corpus and takes the time of the decision (the norm of the gradients, one all-reduce,
the wait for the device) and of the whole step, in each step. Prints medians on rank 0.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist

from llmtrain.recipe.load import load_recipe
from llmtrain.testing.corpus import tiny_corpus
from llmtrain.testing.recipe import tiny_recipe
from llmtrain.training.bad_steps import BadSteps
from llmtrain.training.train import train


def wait() -> None:
    """For the device: kernels are only queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Any, times: list[float]) -> Any:
    """The function, which adds its seconds to `times`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        times.append(time.perf_counter() - began)
        return result

    return call


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=None, help="shared by all ranks; a temporary one when left out")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    folder = options.folder or Path(tempfile.gettempdir()) / f"bad-steps-{os.environ.get('MASTER_PORT', os.getpid())}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "benchmark.yaml"
    if rank == 0:
        corpus = tiny_corpus(folder / "corpus", seq_len=options.seq_len)
        model = {
            "name": "mpt_causal_lm",
            "init_device": "mixed",
            "d_model": options.d_model,
            "n_heads": options.d_model // 64,
            "n_layers": options.n_layers,
            "vocab_size": corpus.vocab_size,
            "no_bias": True,
            "attn_config": {"alibi": True},
        }
        tiny_recipe(
            folder / "made.yaml",
            corpus,
            run_name="benchmark",
            max_seq_len=options.seq_len,
            model=model,
            global_train_batch_size=options.batch,
            device_train_microbatch_size=4,
            max_duration=f"{options.steps}ba",
            eval_interval="100000ba",
            eval_loader=None,
            save_folder=None,
            precision="amp_bf16" if torch.cuda.is_available() else "fp32",
            console_log_interval="10ba",
        ).replace(recipe)
    while not recipe.exists():
        time.sleep(0.5)
    steps, decisions = list[float](), list[float]()
    Trainer._train_batch = timed(Trainer._train_batch, steps)
    BadSteps.decide = timed(BadSteps.decide, decisions)  # type: ignore[method-assign]
    os.chdir(folder)
    train(load_recipe(recipe))
    if dist.get_global_rank() == 0:
        step, decision = statistics.median(steps[5:]), statistics.median(decisions[5:])
        print(f"step {step * 1000:.1f} ms, of which the decision {decision * 1000:.2f} ms: {decision / step:.2%}")


if __name__ == "__main__":
    main()
