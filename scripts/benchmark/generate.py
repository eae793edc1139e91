"""Speed of greedy generation: llmtrain against transformers' `generate`, on the same export, in the same run.

    python scripts/benchmark/generate.py --out generate

Models have random weights (normal, 0.02) and are written once, as a Hugging Face folder of transformers' own MPT, which
both sides open. Each lives in a process of its own and they take turns, so that what else the machine does falls on
both. A case is SHAPE:PRECISION:BATCHxPROMPT+NEW, such as 125m:bf16:8x512+128. Both sides read the same random tokens
and generate so many new ones a row, whatever these are; the tokens must be the same. Where they part, the distance of
the two largest logits there, in float32, says whether it was a near tie.

The table gives seconds of CPU and tokens a second by the clock, medians of the rounds, and the median of the ratios of
each round: below 1, llmtrain is faster. `--clock` says which of the two clocks the ratio is of; both are in the JSON.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from side import Side

SHAPES = {
    "tiny": {"d_model": 256, "n_heads": 8, "n_layers": 4, "vocab_size": 4096},
    "125m": {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50368},
}
CASES = tuple(
    f"{shape}:{precision}:{batch}x{prompt}+{new}"
    for shape, new in (("tiny", 128), ("125m", 64))
    for precision in ("fp32", "bf16")
    for batch in (1, 8)
    for prompt in (64, 512)
)
SIDES = ("llmtrain", "transformers")
NEAR_TIE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of the largest logit: closer than this, the order of two tokens is a matter of rounding."""
WORKER = Path(__file__).with_name("generate_worker.py")


class Case(NamedTuple):
    """What is generated."""

    shape: str
    precision: str
    batch: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        try:
            shape, precision, sizes = text.split(":")
            batch, _, rest = sizes.partition("x")
            prompt, _, new = rest.partition("+")
            case = cls(shape, precision, int(batch), int(prompt), int(new))
        except ValueError:
            raise SystemExit(f"--cases: {text!r} is not SHAPE:PRECISION:BATCHxPROMPT+NEW") from None
        if shape not in SHAPES or precision not in NEAR_TIE:
            raise SystemExit(f"--cases: {text!r}: shapes are {', '.join(SHAPES)}; precisions fp32 and bf16")
        return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="of the ratio; on a GPU always wall")
    parser.add_argument("--threads", type=int, default=1, help="of each side; they take turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write OUT.json")
    args = parser.parse_args()
    clock = args.clock if args.device == "cpu" else "wall"
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "settings": {**vars(args), "out": None, "clock": clock},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for text in args.cases:
            case = Case.parse(text)
            found = result["cases"][text] = measure(case, export(case.shape, Path(folder)), args)
            print(f"{text}: {ratio(found['rounds'], clock):.2f}", file=sys.stderr, flush=True)
    result["machine"] += f", {os.getloadavg()[0]:.1f} at the end"
    show(result, clock)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    if any(case["apart"] and not case["apart"]["near_tie"] for case in result["cases"].values()):
        sys.exit("the tokens are not the same: see above")


def export(shape: str, folder: Path) -> Path:
    """A model of that shape with random weights, once."""
    import torch
    from transformers import MptConfig, MptForCausalLM

    path = folder / shape
    if not path.exists():
        torch.manual_seed(0)
        model = MptForCausalLM(MptConfig(max_seq_len=2048, **SHAPES[shape]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0.0, 0.02)
        model.save_pretrained(path)
    return path


def measure(case: Case, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The rounds of one case, and whether the tokens agree."""
    sides = {name: Side([sys.executable, str(WORKER), name], args.threads) for name in SIDES}
    sizes = {"batch": case.batch, "prompt": case.prompt}
    for side in sides.values():
        side.ask(do="open", path=str(path), precision=case.precision, device=args.device, threads=args.threads)
    rounds: dict[str, list[Any]] = {name: [] for name in SIDES}
    for _ in range(args.warmup + args.rounds):
        for name, side in sides.items():
            rounds[name].append(side.ask(do="generate", new=case.new, **sizes))
    apart = first_difference(*(rounds[name][0].pop("tokens") for name in SIDES))
    if apart:
        with_fp32 = Side([sys.executable, str(WORKER), "llmtrain"], args.threads)
        with_fp32.ask(do="open", path=str(path), precision="fp32", device=args.device, threads=args.threads)
        apart |= with_fp32.ask(do="margin", row=apart["row"], tokens=apart.pop("before"), **sizes)
        apart["near_tie"] = apart["margin"] <= NEAR_TIE[case.precision] * apart["largest"]
        with_fp32.stop()
    for side in sides.values():
        side.stop()
    kept = {name: [{k: one[k] for k in ("cpu", "wall")} for one in rounds[name][args.warmup :]] for name in SIDES}
    return {"rounds": kept, "apart": apart, "new_tokens": case.batch * case.new}


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any] | None:
    """Where two sets of rows part first; None if they do not."""
    steps = zip(*(zip(a, b, strict=True) for a, b in zip(ours, theirs, strict=True)), strict=True)
    for step, pairs in enumerate(steps):
        for row, (a, b) in enumerate(pairs):
            if a != b:
                return {"row": row, "step": step, "before": ours[row][:step]}
    return None


def ratio(rounds: dict[str, list[dict[str, float]]], clock: str) -> float:
    """Median over the rounds of llmtrain's time over the other's."""
    ours, theirs = (rounds[name] for name in SIDES)
    return statistics.median(a[clock] / b[clock] for a, b in zip(ours, theirs, strict=True))


def show(result: dict[str, Any], clock: str) -> None:
    """The table."""
    table = Table(title=f"{result['date']}: {result['machine']}", title_justify="left")
    for name in ("case", *(f"{side}: CPU s, tokens/s" for side in SIDES), f"ratio ({clock})", "the same tokens"):
        table.add_column(name, overflow="fold")
    for text, case in result["cases"].items():
        cells = []
        for name in SIDES:
            cpu, wall = (statistics.median(one[k] for one in case["rounds"][name]) for k in ("cpu", "wall"))
            cells.append(f"{cpu:.2f}, {case['new_tokens'] / wall:,.0f}")
        apart, same = case["apart"], "all"
        if apart:
            kind = "near tie" if apart["near_tie"] else "NOT A TIE"
            same = (
                f"up to {apart['step']} of row {apart['row']}: {kind}, {apart['margin']:.1e} of {apart['largest']:.1f}"
            )
        table.add_row(text, *cells, f"{ratio(case['rounds'], clock):.2f}", same)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    main()
