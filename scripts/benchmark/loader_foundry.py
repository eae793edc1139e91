"""llm-foundry's side of loader.py: runs in llm-foundry's environment, does what it is told over stdin."""

import json
import resource
import sys
import time
from itertools import islice
from typing import Any

import torch
from llmfoundry import __version__
from llmfoundry.data.text_data import build_text_dataloader
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def main() -> None:
    torch.set_num_threads(1)
    loaders: dict[int, Any] = {}
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "versions":
            answer: object = f"llm-foundry {__version__}, torch {torch.__version__}"
        else:
            workers = task["workers"]
            if workers not in loaders:
                loaders[workers] = build(task["folder"], task["seq_len"], task["batch_size"], workers)
            answer = timed(loaders[workers], task["batches"])
        print(f"answer: {json.dumps(answer)}", flush=True)


def build(folder: str, seq_len: int, batch_size: int, workers: int) -> Any:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=seq_len
    )
    dataset = {
        "local": folder,
        "remote": None,
        "max_seq_len": seq_len,
        "shuffle": True,
        "shuffle_seed": 17,
        "eos_token_id": 0,
        "num_canonical_nodes": 1,
    }
    how = {"persistent_workers": False, "pin_memory": False, "prefetch_factor": 2 if workers else None}
    spec = build_text_dataloader(tokenizer, batch_size, dataset, True, workers, **how)
    return spec.dataloader


def timed(loader: Any, batches: int) -> dict[str, float]:
    """Seconds of an epoch of so many batches, by the clock and of the processor, workers included; a checksum."""
    before, clock = cpu_seconds(), time.perf_counter()
    total = sum(int(batch["input_ids"].sum()) for batch in islice(iter(loader), batches))
    return {"wall": time.perf_counter() - clock, "cpu": cpu_seconds() - before, "sum": total}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
