"""What `deterministic: true` costs: training steps of a small MPT with torch's deterministic operations on and off.

    python scripts/benchmark/determinism.py [--steps 20] [--d-model 256]

Both are taken in turn within one process, so that they meet the same machine; medians are printed. On a GPU, start it
with CUBLAS_WORKSPACE_CONFIG=:4096:8, as a run with the key has it.
"""

import argparse
import statistics
import time

import torch

from llmtrain.model.config import AttentionConfig, MPTConfig
from llmtrain.model.mpt import MPT


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = {"d_model": options.d_model, "n_heads": 4, "n_layers": 4, "vocab_size": 4096, "no_bias": True}
    config = MPTConfig(**shape, max_seq_len=options.length, attn_config=AttentionConfig(alibi=True))
    model = MPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4096, (4, options.length), device=device)

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds: dict[bool, list[float]] = {False: [], True: []}
    torch.utils.deterministic.fill_uninitialized_memory = False
    for number in range(options.steps + 2):
        for on in (False, True) if number % 2 else (True, False):
            torch.use_deterministic_algorithms(on)
            taken = step()
            if number >= 2:
                seconds[on].append(taken)
    off, on = (statistics.median(seconds[which]) for which in (False, True))
    print(
        f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.steps} steps of each"
    )
    print(f"off {off * 1e3:8.1f} ms   on {on * 1e3:8.1f} ms   on / off {on / off:.3f}")


if __name__ == "__main__":
    main()
