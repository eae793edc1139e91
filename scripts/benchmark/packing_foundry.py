"""llm-foundry's side of packing.py: runs in llm-foundry's environment, does what it is told over stdin."""

import json
import sys
import time
import types

import llmfoundry.data.dataloader as foundry_dataloader
import numpy as np
import torch
from llmfoundry import __version__
from llmfoundry.data.packing import BinPackCollator, auto_packing_ratio

IGNORE = -100


def main() -> None:
    torch.set_num_threads(1)
    sets: dict[str, tuple[int, list[int]]] = {}
    examples: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for line in sys.stdin:
        task = json.loads(line)
        name, batch = task.get("set"), task.get("batch")
        if task["do"] == "versions":
            answer: object = f"llm-foundry {__version__}, torch {torch.__version__}"
        elif task["do"] == "lengths":
            sets[name] = task["seq_len"], task["lengths"]
            answer = len(task["lengths"])
        elif task["do"] == "auto":
            answer = auto_ratio(*sets[name], batch)
        elif task["do"] == "fill":
            answer = [fill(*sets[name], batch, ratio) for ratio in task["ratios"]]
        else:
            examples[name] = examples.get(name) or [tokens(length) for length in sets[name][1]]
            answer = timed(sets[name][0], examples[name], batch, task["ratio"])
        print(f"answer: {json.dumps(answer)}", flush=True)


def auto_ratio(seq_len: int, lengths: list[int], batch: int) -> float:
    """What its own search picks, given these examples in place of its data loader's first batch."""

    def build_dataloader(cfg: object, tokenizer: object, n_examples: int) -> types.SimpleNamespace:
        taken = lengths[:n_examples]
        mask = torch.arange(max(taken))[None, :] < torch.tensor(taken)[:, None]
        data = {"input_ids": mask.to(torch.int8), "attention_mask": mask.to(torch.int8)}
        return types.SimpleNamespace(dataloader=[data])

    real, foundry_dataloader.build_dataloader = foundry_dataloader.build_dataloader, build_dataloader
    try:
        return float(auto_packing_ratio({"dataset": {"max_seq_len": seq_len}}, None, batch))
    finally:
        foundry_dataloader.build_dataloader = real


def fill(seq_len: int, lengths: list[int], batch: int, ratio: float) -> dict[str, float]:
    """One pass over the examples with a ratio: how full its rows are, and what is left over at the end."""
    packer = BinPackCollator(lambda x: x, batch, seq_len, 0, "right", is_profiling=True)
    step = int(ratio * batch)
    given = 0
    for start in range(0, len(lengths) - step + 1, step):
        sizes = lengths[start : start + step]
        packer._pack_trimmed_examples([{"input_ids": torch.empty(0)} for _ in sizes], sizes)
        given += sum(sizes)
    left = sum(size for size, _ in packer._leftover_bins)
    return {
        "ratio": ratio,
        "efficiency": packer.efficiency,
        "wasted": left / given,
        "rows_left": len(packer._leftover_bins),
    }


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.random.default_rng(length).integers(0, 50_000, length))
    labels = ids.clone()
    labels[: length // 2] = IGNORE
    return ids, labels


def timed(
    seq_len: int, examples: list[tuple[torch.Tensor, torch.Tensor]], batch: int, ratio: float
) -> dict[str, float]:
    """CPU seconds of a pass: padding the raw batch, as its base collator has to, and packing it."""
    seconds = {"pad": 0.0, "pack": 0.0}

    def pad(raw: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.zeros(len(raw), seq_len, dtype=torch.int64)
        labels = torch.full((len(raw), seq_len), IGNORE)
        mask = torch.zeros(len(raw), seq_len, dtype=torch.bool)
        for row, (these, targets) in enumerate(raw):
            ids[row, : len(these)] = these
            labels[row, : len(these)] = targets
            mask[row, : len(these)] = True
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    packer = BinPackCollator(pad, batch, seq_len, 0, "right")
    step = int(ratio * batch)
    for start in range(0, len(examples) - step + 1, step):
        begin = time.process_time()
        padded = pad(examples[start : start + step])
        middle = time.process_time()
        packer.pack(padded)
        seconds["pad"] += middle - begin
        seconds["pack"] += time.process_time() - middle
    return seconds


if __name__ == "__main__":
    main()
