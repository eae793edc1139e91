"""One model of step.py, in a process and, where need be, an environment of its own; does what it is told over stdin."""

import contextlib
import json
import os
import resource
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "cannot allocate memory")
Task = dict[str, Any]


def main() -> None:
    import_what_the_model_needs(sys.argv[1])
    side = Side(sys.argv[1])
    # What libraries print goes elsewhere.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = getattr(side, task.pop("do"))(**task)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or any(text in str(error).lower() for text in OUT_OF_MEMORY):
                answer = {"failed": "out of memory"}
            else:
                answer = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(f"answer: {json.dumps(answer)}", file=answers, flush=True)


def import_what_the_model_needs(kind: str) -> None:
    """So that memory can be counted from here."""
    if kind == "llmtrain":
        import llmtrain.model.mpt
        import llmtrain.training.optimizers  # noqa: F401
    elif kind == "transformers":
        import transformers.models.mpt.modeling_mpt  # noqa: F401
    else:
        import llmfoundry.models.mpt.modeling_mpt  # noqa: F401
    import torch._dynamo  # noqa: F401  (torch's optimizers import it when they are first used)


class Side:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.base = memory("RssAnon")

    def build(
        self,
        shape: dict[str, int],
        length: int,
        batch: int,
        amp: bool,
        attention: str,
        device: str,
        checkpointing: str | None,
        compile_blocks: bool,
        fused: bool,
        flush: bool,
        threads: int,
        memory_cap: float | None,
        query_key_gain: float,
    ) -> Task:
        """Makes model, optimizer and data."""
        if memory_cap:
            limit = memory("VmData") + int(memory_cap * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        self.device, self.amp, self.shape, self.length = torch.device(device), amp, shape, length
        if self.kind == "llmtrain" and self.device.type == "cpu":
            as_in_training()
        elif flush:
            torch.set_flush_denormal(True)
        torch.set_num_threads(threads)
        self.model = BUILD[self.kind](shape, length, attention, self.device)
        fill(self.model, shape["n_layers"], query_key_gain)
        blocks = self.model.transformer.blocks
        for i in range(len(blocks)):
            if checkpointing and self.kind != "llmtrain":
                from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

                blocks[i] = checkpoint_wrapper(blocks[i])
            if compile_blocks and self.kind != "llmtrain":
                blocks[i].compile(dynamic=False)
        if checkpointing and self.kind == "llmtrain":
            from llmtrain.training import activation_checkpointing

            activation_checkpointing.apply(self.model, checkpointing)
        if compile_blocks and self.kind == "llmtrain":
            from llmtrain.recipe.recipe import CompileConfig
            from llmtrain.training.compile import compile_blocks as compile_ours

            compile_ours(self.model, CompileConfig(), self.device)
        self.optimizer = optimizer(self.kind, self.model, fused)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, shape["vocab_size"], (batch, length), generator=generator)
        self.ids = ids.to(self.device)
        versions = {"torch": torch.__version__, **version_of(self.kind)}
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "versions": versions, "device": name}

    def step(self) -> Task:
        """Forward, backward and AdamW; seconds of CPU and of the clock on the wall, peak memory, loss."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        else:
            forget_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast if self.amp else contextlib.nullcontext():
            loss = LOSS[self.kind](self.model, self.ids)
        loss.backward()
        self.optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        # Less the pages of libraries, which the kernel drops from memory when others need it.
        files = memory("RssFile") + memory("RssShmem")
        peak = torch.cuda.max_memory_allocated() if cuda else memory("VmHWM") - files - self.base
        return {"cpu": cpu, "wall": wall, "peak_bytes": peak, "loss": float(loss.detach())}

    def kernel(self) -> Task:
        """Which attention kernel ran; of blockwise also the share of the causal pairs that ALiBi windows kept."""
        if self.kind != "llmtrain":
            return {}
        name = self.model.transformer.choice.kernel.name
        return {"kernel": name, "kept": share_kept(self.model, self.ids) if name == "blockwise" else None}

    def reference(self, path: str, length: int) -> Task:
        """Writes this model's logits in float64, with the weights of the beginning."""
        torch.save(self._logits(length, torch.float64), path)
        return {}

    def error(self, path: str, length: int) -> Task:
        """Compares this model's float32 logits with those of `reference`."""
        exact = torch.load(path)
        difference = self._logits(length, torch.float32).double() - exact
        return {"max": float(difference.abs().max()), "rms": float(difference.square().mean().sqrt())}

    def _logits(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        fill(self.model, self.shape["n_layers"], 1.0)
        with torch.no_grad():
            logits: torch.Tensor = self.model.to(dtype)(self.ids[:1, :length]).logits
        return logits[0].cpu()


def as_in_training() -> None:
    """What `llmtrain train` sets on a CPU."""
    from llmtrain.model.kernels.denormals import flush_denormals
    from llmtrain.training.host_memory import keep_freed_memory

    flush_denormals()
    keep_freed_memory()


def share_kept(model: Any, ids: torch.Tensor) -> float:
    """Of all causal pairs of a query and a key in all heads and layers, how many the blockwise kernel computes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    pairs = [0, 0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.llmtrain.blockwise_attention.default:
                for (_, first, end, *_), begins in zip(args[3].tolist(), out[2].tolist(), strict=True):
                    n = end - first
                    for begin in begins:
                        pairs[0] += n * (end - begin) - n * (n - 1) // 2
                        pairs[1] += n * end - n * (n - 1) // 2
            return out

    with torch.no_grad(), Count():
        model(ids, labels=ids)
    return pairs[0] / pairs[1]


def build_llmtrain(shape: dict[str, int], length: int, attention: str, device: torch.device) -> Any:
    from llmtrain.model.config import MPTConfig
    from llmtrain.model.mpt import MPT

    attn = {"alibi": True, "attn_impl": attention}
    config = MPTConfig(name="mpt_causal_lm", max_seq_len=length, attn_config=attn, no_bias=True, **shape)
    return MPT(config, device)


def build_transformers(shape: dict[str, int], length: int, attention: str, device: torch.device) -> Any:
    from transformers import MptConfig, MptForCausalLM

    sizes = {key: shape[key] for key in ("d_model", "n_heads", "n_layers", "vocab_size")}
    with device:
        return MptForCausalLM(MptConfig(max_seq_len=length, use_cache=False, **sizes)).train()


def build_foundry(shape: dict[str, int], length: int, attention: str, device: torch.device) -> Any:
    from llmfoundry.models.mpt.modeling_mpt import MPTConfig, MPTForCausalLM

    attn = {"alibi": True, "attn_impl": "torch" if attention == "auto" else attention}
    config = MPTConfig(
        max_seq_len=length, attn_config=attn, no_bias=True, use_cache=False, init_device=device.type, **shape
    )
    return MPTForCausalLM(config).train()


def fill(model: torch.nn.Module, n_layers: int, query_key_gain: float) -> None:
    """The same weights in every model: each parameter is drawn from a seed that is its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            residual = "out_proj" in name or "down_proj" in name
            parameter.normal_(0.0, 0.02 / (2 * n_layers) ** 0.5 if residual else 0.02, generator=generator)
            if "Wqkv" in name:
                parameter[: 2 * len(parameter) // 3] *= query_key_gain


def optimizer(kind: str, model: torch.nn.Module, fused: bool) -> torch.optim.Optimizer:
    if kind != "llmtrain":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True if fused else None)
    from llmtrain.training.optimizers import AdamWConfig, build_optimizer

    return build_optimizer(AdamWConfig(name="adamw", lr=1e-4), model)


def foundry_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """As its ComposerMPTCausalLM computes it with loss_fn torch_crossentropy."""
    from llmfoundry.models.mpt.modeling_mpt import compute_loss_from_logits

    loss_fn = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="none")
    loss: torch.Tensor = compute_loss_from_logits(model(input_ids=ids), True, ids, loss_fn)
    return loss


BUILD = {"llmtrain": build_llmtrain, "transformers": build_transformers, "llm-foundry": build_foundry}
LOSS = {
    "llmtrain": lambda model, ids: model(ids, labels=ids).loss,
    "transformers": lambda model, ids: model(input_ids=ids, labels=ids).loss,
    "llm-foundry": foundry_loss,
}


def version_of(kind: str) -> dict[str, str]:
    from importlib.metadata import version

    return {kind: version(kind)}


def memory(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def forget_peak() -> None:
    """Has VmHWM start over at the resident size of now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
