"""Time and memory of a training step: llmtrain's MPT against transformers' and llm-foundry's, in the same run.

    python scripts/benchmark/step.py --foundry-python /path/to/python --out step

The models have the same shape, the same weights (each parameter is drawn from a seed that is its name; the first losses
must agree) and the same tokens. Each lives in a process of its own and they take turns, step by step, so that what else
the machine does falls on all of them. A step is forward, backward and AdamW. The table gives the median over the rounds
of the ratio of step times, and the ratio of peak memory: what a step has resident, or allocated on a GPU, beyond what
the process had after its imports.

llm-foundry runs in an environment of its own (docs/benchmarks.md says how to make it); without --foundry-python it is
left out. A model that does not fit into --memory-cap is said to be out of memory. The peers run as they come, with
torch's default AdamW, which is a loop; `--peer-fused` gives them its fused kernel and `--peer-flush` flushes their
denormal numbers, both of which llmtrain does by itself on a CPU. MPT's "bf16" is autocast over float32 weights.

A case is SHAPE:PRECISION:LENGTH[xBATCH], such as 125m:bf16:512x2. A model is llmtrain, transformers or llm-foundry, and
may have an attention kernel, +compile (of each block), +ac (activation checkpointing of each block) and, llmtrain's
only, +selective (all of the block but attention): llmtrain:flex+compile, llm-foundry:flash+ac. Examples:

    --cases tiny:fp32:512 tiny:fp32:8192 --models llmtrain transformers --rounds 5
    --cases 7b-block:bf16:2048x4 --models llmtrain:flash llmtrain:flex+compile llm-foundry:flash --one-at-a-time
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from step_report import draw, show

SHAPES = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 4, "vocab_size": 4096},
    "long": {"d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 4096},
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50368},
    "1b": {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50368},
    "3b": {"d_model": 2560, "n_heads": 32, "n_layers": 32, "vocab_size": 50368},
    "7b-block": {"d_model": 4096, "n_heads": 32, "n_layers": 4, "vocab_size": 50432},
    "7b": {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432},
}
SUITES = {
    "cpu": (
        *("tiny:fp32:512", "tiny:bf16:512", "125m:fp32:512", "125m:bf16:512x2", "125m:fp32:1024", "125m:bf16:1024"),
        *("125m:fp32:2048", "125m:bf16:2048"),
    ),
    "cpu-long": tuple(f"long:fp32:{length}" for length in (512, 8192, 16384, 32768, 65536)),
    "gpu": (
        *("125m:bf16:2048x16", "1b:bf16:2048x4", "7b-block:bf16:2048x4", "7b-block:bf16:8192", "7b-block:bf16:32768"),
        *("7b-block:bf16:65536", "1b:bf16:65536"),
    ),
}
CHECKPOINTING = {"ac": "full", "selective": "selective"}
AGREE = {"fp32": 2e-4, "bf16": 2e-3}
"""How far first losses may be apart."""
WORKER = Path(__file__).with_name("step_worker.py")


class Case(NamedTuple):
    """A shape, a precision and the size of a batch."""

    shape: str
    precision: str
    length: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        shape, precision, size = [*text.split(":"), "", ""][:3]
        length, _, batch = size.partition("x")
        if shape not in SHAPES or precision not in AGREE or not length.isdigit() or not (batch or "1").isdigit():
            raise SystemExit(f"--cases: {text!r} is not SHAPE:PRECISION:LENGTH[xBATCH]; shapes are {', '.join(SHAPES)}")
        return cls(shape, precision, int(length), int(batch or 1))


class Model(NamedTuple):
    """Whose model, with which attention."""

    kind: str
    attention: str
    compiled: bool
    checkpointing: str | None

    @classmethod
    def parse(cls, text: str) -> "Model":
        name, *options = text.split("+")
        kind, _, attention = name.partition(":")
        if kind not in ("llmtrain", "transformers", "llm-foundry") or set(options) - {"compile", *CHECKPOINTING}:
            raise SystemExit(f"--models: {text!r} is not llmtrain, transformers or llm-foundry[:KERNEL][+compile][+ac]")
        checkpointing = next((CHECKPOINTING[option] for option in options if option in CHECKPOINTING), None)
        return cls(kind, attention or "auto", "compile" in options, checkpointing)


def main() -> None:
    args = arguments()
    device = args.device or ("cuda" if has_gpu() else "cpu")
    suites = args.suite or (["gpu"] if device == "cuda" else ["cpu", "cpu-long"])
    cases = args.cases or [case for suite in suites for case in SUITES[suite]]
    models = args.models or ["llmtrain", "transformers", *(["llm-foundry"] if args.foundry_python else [])]
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        "clock": "wall" if device == "cuda" else args.clock,
        "settings": {key: value for key, value in vars(args).items() if key not in ("foundry_python", "out")},
        "cases": {},
    }
    console = Console(width=None if sys.stdout.isatty() else 120)
    for text in cases:
        result["cases"][text] = measure(Case.parse(text), models, args, device)
        show(console, result, only=text)
    result["machine"] += f", {os.getloadavg()[0]:.1f} at the end"
    show(console, result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2, default=str) + "\n")
        draw(result, args.out.with_suffix(".png"))
    if any(found.get("losses_apart") for found in result["cases"].values()):
        sys.exit("the models did not compute the same: see above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundry-python", help="python of an environment with llm-foundry 0.22.0")
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), help="default: cpu and cpu-long, or gpu")
    parser.add_argument("--cases", nargs="+", help="instead of a suite")
    parser.add_argument("--models", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="on a GPU always wall")
    parser.add_argument("--threads", type=int, default=1, help="of each model; they take turns")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--memory-cap", type=float, default=10, help="GiB that a model may allocate on a CPU")
    parser.add_argument("--one-at-a-time", action="store_true", help="no interleaving, for models that fill a GPU")
    parser.add_argument("--peer-fused", action="store_true", help="fused AdamW for the peers, too")
    parser.add_argument("--peer-flush", action="store_true", help="flush-to-zero for the peers, too")
    parser.add_argument(
        "--query-key-gain", type=float, default=1.0, help="larger queries and keys, as trained ones are"
    )
    parser.add_argument(
        "--error-length", type=int, default=0, help="also compare logits of so many tokens with float64"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    return parser.parse_args()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(case: Case, models: list[str], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Builds the models, runs the rounds and gathers what each said; {"failed": reason} where one could not."""
    workers, found = {}, {}

    def start(name: str) -> None:
        workers[name], found[name] = built(name, case, args, device)
        found[name]["steps"] = []

    def step(name: str) -> None:
        if "failed" not in found[name]:
            done = workers[name].ask(do="step")
            if "failed" in done:
                found[name]["failed"] = done["failed"]
                workers[name].stop()
            else:
                found[name]["steps"].append(done)

    def finish(name: str) -> None:
        if "failed" not in found[name]:
            found[name] |= workers[name].ask(do="kernel")
        workers[name].stop()

    turns = [[name] for name in models] if args.one_at_a_time else [models]
    for together in turns:
        for name in together:
            start(name)
        for _ in range(args.warmup + args.rounds):
            for name in together:
                step(name)
        if args.error_length and case.precision == "fp32" and not args.one_at_a_time:
            compare_with_float64(workers, found, case, args, device)
        for name in together:
            finish(name)
    return summary(case, found, args, device)


def built(name: str, case: Case, args: argparse.Namespace, device: str) -> "tuple[Worker, dict[str, Any]]":
    model = Model.parse(name)
    python = args.foundry_python if model.kind == "llm-foundry" else sys.executable
    if python is None:
        raise SystemExit("llm-foundry needs --foundry-python")
    worker = Worker(python, model.kind, args.threads)
    answer = worker.ask(
        do="build",
        shape=SHAPES[case.shape],
        length=case.length,
        batch=case.batch,
        amp=case.precision == "bf16",
        attention=model.attention,
        device=device,
        checkpointing=model.checkpointing,
        compile_blocks=model.compiled,
        fused=args.peer_fused,
        flush=args.peer_flush,
        threads=args.threads,
        memory_cap=args.memory_cap if device == "cpu" else None,
        query_key_gain=args.query_key_gain,
    )
    return worker, answer


def compare_with_float64(
    workers: "dict[str, Worker]",
    found: dict[str, Any],
    case: Case,
    args: argparse.Namespace,
    device: str,
) -> None:
    """How far logits in float32 are from those of llmtrain's eager kernel in float64, with the first weights."""
    length = min(case.length, args.error_length)
    exact, _ = built("llmtrain:eager", case, args, device)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "logits.pt")
        answer = exact.ask(do="reference", path=path, length=length)
        exact.stop()
        for name in workers:
            if "failed" not in found[name]:
                found[name]["error"] = answer or workers[name].ask(do="error", path=path, length=length)


def summary(case: Case, found: dict[str, Any], args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Step times and ratios; tokens a second and MFU on a GPU."""
    from llmtrain.model.config import MPTConfig
    from llmtrain.model.flops import flops_per_token
    from llmtrain.model.peak_flops import peak_flops

    clock = "wall" if device == "cuda" else args.clock
    for one in found.values():
        steps = one["steps"][args.warmup :]
        if "failed" in one or not steps:
            continue
        one["seconds"] = statistics.median(step[clock] for step in steps)
        one["peak_bytes"] = max(step["peak_bytes"] for step in steps)
        one["tokens_per_second"] = case.batch * case.length / one["seconds"]
        config = MPTConfig(name="mpt_causal_lm", max_seq_len=case.length, **SHAPES[case.shape])
        peak = peak_flops(one["device"]) if device == "cuda" and case.precision == "bf16" else None
        one["mfu"] = one["tokens_per_second"] * flops_per_token(config, case.length) / peak if peak else None
    first = next(iter(found.values()))
    for one in found.values():
        if "seconds" in one and "seconds" in first:
            pairs = zip(first["steps"][args.warmup :], one["steps"][args.warmup :], strict=True)
            one["time_ratio"] = statistics.median(a[clock] / b[clock] for a, b in pairs)
            one["memory_ratio"] = first["peak_bytes"] / one["peak_bytes"]
    losses = [one["steps"][0]["loss"] for one in found.values() if one["steps"]]
    differences = [abs(loss - losses[0]) for loss in losses]
    agree = all(difference <= AGREE[case.precision] for difference in differences)  # of nan nothing is true
    return {"models": found, "loss_difference": max(differences, default=0.0), "losses_apart": not agree}


class Worker:
    """A model in its own process, doing what it is asked."""

    def __init__(self, python: str, kind: str, threads: int) -> None:
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads),
        }
        self._process = subprocess.Popen(
            [python, str(WORKER), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **task: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("answer: "):
                    return json.loads(line.removeprefix("answer: "))
        except BrokenPipeError:
            pass
        return {"failed": f"its process ended with {self._process.wait()}"}

    def stop(self) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait()


if __name__ == "__main__":
    main()
