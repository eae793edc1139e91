"""One side of generate.py: a model that is opened from an export and generates, as it is told on standard input."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

Task = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Side:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def open(self, path: str, precision: str, device: str, threads: int, compiled: bool = False) -> Task:
        """Opens the export; as the library itself does, but for the dtype and the number of threads."""
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        if self.kind == "llmtrain":
            self.model = open_ours(Path(path), DTYPES[precision], self.device)
        else:
            from transformers import AutoModelForCausalLM

            # The keyword `dtype` came with transformers 4.56.
            self.model = AutoModelForCausalLM.from_pretrained(path).to(self.device, DTYPES[precision]).eval()
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "torch": torch.__version__}

    def generate(self, batch: int, prompt: int, new: int) -> Task:
        """Greedy tokens, and the seconds that they took: CPU and clock on the wall."""
        ids = self._prompts(batch, prompt)
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        tokens = self._ours(ids, new) if self.kind == "llmtrain" else self._theirs(ids, new)
        self._wait()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "tokens": tokens}

    def margin(self, batch: int, prompt: int, row: int, tokens: list[int]) -> Task:
        """How far the two largest logits are apart after a prompt and some of its tokens."""
        ids = [*self._prompts(batch, prompt)[row].tolist(), *tokens]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids], device=self.device)).logits[0, -1].float()
        first, second = logits.topk(2).values.tolist()
        return {"margin": first - second, "largest": float(logits.abs().max())}

    def _prompts(self, batch: int, prompt: int) -> torch.Tensor:
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(1))

    def _ours(self, ids: torch.Tensor, new: int) -> list[list[int]]:
        from llmtrain.generation.generate import generate

        return generate(self.model, ids.tolist(), max_new_tokens=new)

    def _theirs(self, ids: torch.Tensor, new: int) -> list[list[int]]:
        ids = ids.to(self.device)
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def open_ours(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """As `llmtrain generate` opens it, but for the tokenizer, which an export of a benchmark has none of."""
    from llmtrain.checkpoint.source import open_source
    from llmtrain.model.kernels.denormals import flush_denormals
    from llmtrain.model.mpt import MPT

    flush_denormals()
    source = open_source(path, None)
    model = MPT(source.config, device="meta")
    weights = {name: value.to(device, dtype) for name, value in source.weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def main() -> None:
    side = Side(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes elsewhere
    for line in sys.stdin:
        task = json.loads(line)
        answer = getattr(side, task.pop("do"))(**task)
        print(f"answer: {json.dumps(answer)}", file=answers, flush=True)


if __name__ == "__main__":
    main()
